"""What every loss has in common: where its scores come from, and the penalty on large logits (L2Wrap).

L2Wrap (BlinkDL's RWKV-LM): 0.5e-4 * max_logit^2, averaged over the trained positions. Its gradient is the tradition's,
1e-4 * max_logit at the largest logit of each position; as a part of the loss it follows accumulation and loss scaling.
It is a metric of its own and never part of the logged loss.

Legend: T tokens, n pairs, A answer tokens, C width.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from rwkv_rlhf.losses.pairs import log_weights, pair_scores, segment_sums
from rwkv_rlhf.losses.tokens import IGNORE, L2WRAP, TokenScores, gathered_scores, token_scores

Metrics = dict[str, Tensor]


class Loss:
    """A loss as the training loop sees it.

    Attributes:
        kind: "text" (sums over trained tokens), "pairs" (sums over pairs) or "rated" (sums over single answers).
        needs_reference: whether the batch must carry the reference's log-probabilities.
        needs_teacher: whether the batch must carry a teacher's logits.
        needs_weights: whether the scores of pairs must carry `log_weight`.
        l2wrap: whether the penalty on large logits is on unless the user says otherwise.
        settings: names of the settings that `__call__` takes as keywords.
    """

    kind: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    l2wrap: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    def __call__(self, scores: Any, batch: Any, **settings: Any) -> tuple[Tensor, Metrics]:
        """Scores -> (sum over trained tokens or pairs, detached sums by name; "loss" is what is logged as the loss)."""
        raise NotImplementedError

    def required_stats(self, *, l2wrap: bool, **settings: Any) -> dict[str, bool]:
        """What `token_scores` must find besides log p, as its keywords."""
        return {"want_max": l2wrap}

    def at(self, batch: Any) -> Tensor | None:
        """Tokens (T,K) whose scores the loss needs too; its scores are then the pair that `gathered_scores` gives."""
        return None

    def from_scores(self, scores: Any, batch: Any, *, l2wrap: bool, **settings: Any) -> tuple[Tensor, Metrics]:
        """As `__call__`, from the scores of all tokens; with `l2wrap` the objective, but not the metric "loss",
        includes the penalty."""
        raise NotImplementedError

    def from_hidden(
        self, head: nn.Module, hidden: Tensor, batch: Any, *, chunk: int, l2wrap: bool, **settings: Any
    ) -> tuple[Tensor, Metrics]:
        """As `from_scores`, from hidden states (T,C) through the chunked head."""
        scores: Any
        if (at := self.at(batch)) is not None:
            scores = gathered_scores(head, hidden, batch.targets, at, chunk=chunk)
        else:
            scores = token_scores(
                head, hidden, batch.targets, chunk=chunk, **self.required_stats(l2wrap=l2wrap, **settings)
            )
        return self.from_scores(scores, batch, l2wrap=l2wrap, **settings)

    @staticmethod
    def penalty(max_logit: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """L2Wrap summed over segments: the mean of each one's trained positions; `starts` are the segments'."""
        squares = segment_sums(max_logit.square(), starts)
        counts = segment_sums((targets != IGNORE).to(squares.dtype), starts)
        return (L2WRAP * squares / counts.clamp_min(1)).sum()


class TextLoss(Loss):
    """A sum over the trained tokens of packed text; `__call__` takes `TokenScores`."""

    kind = "text"
    l2wrap = True

    def required_stats(self, *, l2wrap: bool, **settings: Any) -> dict[str, bool]:
        return {"want_mean": settings.get("smoothing", 0) > 0, "want_max": l2wrap}

    def from_scores(self, scores: TokenScores, batch: Any, *, l2wrap: bool, **settings: Any) -> tuple[Tensor, Metrics]:
        value, metrics = self(scores, batch, **settings)
        if l2wrap:
            penalty = L2WRAP * scores.max_logit.square().sum()
            value, metrics = value + penalty, metrics | {"l2wrap": penalty.detach()}
        return value, metrics


class PairLoss(Loss):
    """A sum over preference pairs; `__call__` takes `PairScores`. L2Wrap averages over both answers of a pair."""

    kind = "pairs"

    def required_stats(self, *, l2wrap: bool, **settings: Any) -> dict[str, bool]:
        return {"want_max": l2wrap, "want_square": self.needs_weights}

    def from_scores(self, scores: TokenScores, batch: Any, *, l2wrap: bool, **settings: Any) -> tuple[Tensor, Metrics]:
        pairs = pair_scores(scores.logp, batch.targets, batch.starts)
        if self.needs_weights:
            excess = scores.logp.detach() - scores.log_square
            pairs = pairs._replace(log_weight=log_weights(excess, batch.targets, batch.starts))
        value, metrics = self(pairs, batch, **settings)
        if l2wrap:
            penalty = self.penalty(scores.max_logit, batch.targets, batch.starts[::2])
            value, metrics = value + penalty, metrics | {"l2wrap": penalty.detach()}
        return value, metrics
