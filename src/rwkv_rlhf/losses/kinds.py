"""What every loss has in common: where its scores come from, what it gives, and the penalty on large logits (L2Wrap).

L2Wrap (BlinkDL's RWKV-LM): 0.5e-4 * max_logit^2, averaged over the trained positions. Its gradient is the tradition's,
1e-4 * max_logit at the largest logit of each position; as a part of the loss it follows accumulation and loss scaling.
It is a metric of its own and never part of the logged loss.

Legend: T tokens, n pairs, A answer tokens, C width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.data.batch import IGNORE, AnswerBatch, PairBatch, TextBatch
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores, pair_metrics, pair_scores, segment_sums
from rwkv_rlhf.losses.tokens import L2WRAP, RequiredStats, TokenScores, token_scores
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.tables import LossFacts

BatchT = TypeVar("BatchT", bound=TextBatch | AnswerBatch)


class LossValue(NamedTuple):
    """What a loss gives of one micro-batch: sums over its trained tokens, pairs or answers, () each.

    `value` is minimised and differentiable. `metrics` are not; "loss" among them is what is logged as the loss. Names
    and units stand in `settings/metrics.py`.
    """

    value: Tensor
    metrics: dict[str, Tensor]

    def per(self, total: float) -> LossValue:
        """Shares of the means over `total` tokens, pairs or answers."""
        return LossValue(self.value / total, {name: amount / total for name, amount in self.metrics.items()})

    def with_l2wrap(self, penalty: Tensor | None) -> LossValue:
        """The penalty joins the objective, but not the metric "loss"; None where L2Wrap is off."""
        if penalty is None:
            return self
        return LossValue(self.value + penalty, self.metrics | {"l2wrap": penalty.detach()})


class Loss(ABC, Generic[BatchT]):
    """A loss as the training loop sees it: a sum over the trained tokens, pairs or rated answers of a batch.

    `facts` is its entry of the table; of the settings it reads those that are named there.
    """

    def __init__(self, facts: LossFacts) -> None:
        self.facts = facts

    @abstractmethod
    def __call__(self, scores: TokenScores, batch: BatchT, config: Config) -> LossValue:
        """The loss of a batch whose tokens have the scores `scores`, with the statistics of `required_stats`."""

    def required_stats(self, config: Config) -> RequiredStats:
        """What must be known of each token besides log p(target)."""
        return RequiredStats(max=self.facts.l2wrap if config.l2wrap is None else config.l2wrap)

    def gathered_tokens(self, batch: BatchT) -> Tensor | None:
        """(T,K) tokens whose scores the loss needs at each position besides the target's."""
        return None

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues | None:
        """The implicit reward that the loss gives each answer; None where it knows none, as of text.

        `reference` (n,2): the reference's summed log-probabilities of (chosen, reject).
        """
        return None

    def temperature(self, config: Config) -> float:
        """What logits are divided by before the softmax."""
        return 1.0

    def from_hidden(
        self, head: nn.Module, hidden: Tensor, batch: BatchT, config: Config, scalar: nn.Module | None = None
    ) -> LossValue:
        """As `__call__`, from the hidden states (T,C) of the tokens that `batch.targets` belong to.

        `scalar`: the scalar head that `facts` names.
        """
        scores = token_scores(
            head,
            hidden,
            batch.targets,
            self.required_stats(config),
            gather=self.gathered_tokens(batch),
            scalar=scalar,
            temperature=self.temperature(config),
            head_chunk=config.head_chunk,
            trained=batch.trained,
        )
        return self(scores, batch, config)


class TextLoss(Loss[TextBatch]):
    """A sum over the trained tokens of packed text."""

    def required_stats(self, config: Config) -> RequiredStats:
        return super().required_stats(config)._replace(mean=bool(config.smoothing))


class TermWeights(NamedTuple):
    """Weights of the two terms of a preference loss."""

    preference: float
    ce: float

    def mixed(self, preference: Tensor, entropy: Tensor) -> Tensor:
        """The weighted sum; a term of weight 0 is left out, so that nothing of it reaches the gradient."""
        if not self.ce:
            return self.preference * preference
        return self.preference * preference + self.ce * entropy


class PairLoss(Loss[PairBatch]):
    """weight * preference loss + weight * CE(chosen), summed over pairs.

    CE(chosen) is the mean negative log-likelihood over the tokens of a pair's chosen answer. Metrics: loss, both terms
    before their weights (`ce`, and the preference under the name `term`), and those of `pair_metrics`.
    """

    term: ClassVar[str]

    @abstractmethod
    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues: ...

    def preference(self, scores: PairScores, reference: Tensor | None, config: Config) -> Tensor:
        """(n,) the preference loss of each pair; unless a loss has its own, -log sigmoid(margin of the rewards)."""
        return -F.logsigmoid(self.rewards(scores, reference, config).margin())

    @abstractmethod
    def weights(self, config: Config) -> TermWeights:
        """How the two terms are mixed."""

    def metrics(self, scores: PairScores, reference: Tensor | None, config: Config) -> dict[str, Tensor]:
        """What is logged besides the terms, as sums over pairs."""
        return pair_metrics(scores, self.rewards(scores, reference, config), reference)

    def __call__(self, scores: TokenScores, batch: PairBatch, config: Config) -> LossValue:
        pairs = pair_scores(scores.logp, batch.targets, batch.segments, scores.log_square)
        reference = batch.reference if self.facts.reference else None  # a file may hold scores of any model
        preference = self.preference(pairs, reference, config).sum()
        entropy = -pairs.chosen_mean.sum()
        value = self.weights(config).mixed(preference, entropy)
        metrics = {"loss": value.detach(), self.term: preference.detach(), "ce": entropy.detach()}
        metrics |= self.metrics(pairs, reference, config)
        return LossValue(value, metrics).with_l2wrap(segment_penalty(scores, batch.targets, batch.segments[::2]))


def token_penalty(scores: TokenScores) -> Tensor | None:
    """L2Wrap summed over tokens; None where the largest logits were not asked for."""
    return None if scores.max_logit is None else L2WRAP * scores.max_logit.square().sum()


def segment_penalty(scores: TokenScores, targets: Tensor, starts: Tensor | Starts) -> Tensor | None:
    """L2Wrap summed over segments, of each the mean over its trained positions; None as for `token_penalty`.

    `starts` are those of the segments: of pairs every second start of an answer, so that both answers are one.
    """
    if scores.max_logit is None:
        return None
    segments = Starts.of(starts)
    squares = segment_sums(scores.max_logit.square(), segments)
    counts = segment_sums((targets != IGNORE).to(squares.dtype), segments)
    return (L2WRAP * squares / counts.clamp_min(1)).sum()
