"""From scores of tokens to scores of answers, and what is logged of pairs, in training and held out alike.

Legend: n pairs, A answer tokens (all answers end to end: chosen_0, reject_0, chosen_1, ...), S segments.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.ops.starts import Starts

TIE = 1e-6  # a margin below this is none: an untrained adapter shows an accuracy of one half


@dataclass(frozen=True)
class PairScores:
    """Summed log-probabilities of both answers of each pair, (n,) float32, and their token counts, (n,) int64.

    `log_weight` (n,): where a loss asks for it, how much both answers look like the policy's own (see `wpo.py`).
    """

    chosen_sum: Tensor
    reject_sum: Tensor
    chosen_count: Tensor
    reject_count: Tensor
    log_weight: Tensor | None = None

    @cached_property  # one node of the graph, however many terms read it
    def chosen_mean(self) -> Tensor:
        """Mean log-probability of a token of the chosen answer, (n,); 0 for an answer without tokens."""
        return self.chosen_sum / self.chosen_count.clamp_min(1)

    @cached_property
    def reject_mean(self) -> Tensor:
        """As `chosen_mean`, of the rejected answer."""
        return self.reject_sum / self.reject_count.clamp_min(1)

    def sums(self) -> Tensor:
        """(n, 2) the sums of (chosen, reject), as references are kept."""
        return torch.stack([self.chosen_sum, self.reject_sum], 1)


class AnswerValues(NamedTuple):
    """One number for each answer of each pair, (n,) each: rewards, or log-ratios to a reference."""

    chosen: Tensor
    reject: Tensor

    def margin(self) -> Tensor:
        """(n,) by how much the chosen answer is ahead."""
        return self.chosen - self.reject


def pair_scores(logp: Tensor, targets: Tensor, starts: Tensor | Starts, log_square: Tensor | None = None) -> PairScores:
    """Sums per answer of token log-probabilities `logp` (A,), which are 0 where `targets` (A,) is IGNORE.

    `starts` (2n+1,) int64: cumulative lengths of chosen_0, reject_0, chosen_1, ... Differentiable with respect to logp.
    `log_square` (A,): log sum_v p(v)^2, from which `log_weight` is made, without a gradient.
    """
    segments = Starts.of(starts)
    sums = segment_sums(logp, segments)
    counts = segment_sums((targets != IGNORE).double(), segments).long()
    log_weight = None
    if log_square is not None:
        excess = segment_sums(logp.detach() - log_square, segments) / counts.clamp_min(1)
        log_weight = excess[0::2] + excess[1::2]
    return PairScores(sums[0::2], sums[1::2], counts[0::2], counts[1::2], log_weight)


def segment_sums(values: Tensor, starts: Tensor | Starts) -> Tensor:
    """Sums (S,) of `values` (A,) between consecutive `starts` (S+1,); an empty segment gives 0.

    Added up in float64 and rounded once, so that an answer of a thousand tokens loses nothing.
    """
    segments = Starts.of(starts)
    assert segments.fit(len(values)), (segments, values.shape)
    lengths = segments.lengths_on(values.device)
    # unsafe: not checked again, for which a GPU would be waited for
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
    return sums.to(values.dtype)


def log_ratios(scores: PairScores, reference: Tensor | None) -> AnswerValues:
    """Summed log policy - log reference of each answer, in nats; `reference` (n,2) float32, of (chosen, reject)."""
    assert reference is not None, "a loss that needs a reference, without its log-probabilities"
    return AnswerValues(scores.chosen_sum - reference[:, 0], scores.reject_sum - reference[:, 1])


def ahead(margin: Tensor) -> Tensor:
    """1 where a margin (n,) is above 0, one half where it is 0 (within TIE), else 0."""
    return (margin > 0).to(margin.dtype).masked_fill(margin.abs() < TIE, 0.5)


@torch.no_grad()
def pair_metrics(
    scores: PairScores, rewards: AnswerValues | None, reference: Tensor | None = None
) -> dict[str, Tensor]:
    """What is logged of pairs, as sums over them; names and units as in `settings/metrics.py`.

    `rewards`: the implicit rewards of the loss, None where no loss defines any: `accuracy` is then that of the
    log-probabilities. `reference` (n,2): the reference's summed log-probabilities; without them nothing is measured
    against a reference.
    """
    raw = AnswerValues(scores.chosen_sum, scores.reject_sum)
    found = {"chosen_logp": raw.chosen.sum(), "reject_logp": raw.reject.sum()}
    decisive = raw.margin()
    if reference is not None:
        decisive = log_ratios(scores, reference).margin()
        found |= {"logp_margin": decisive.sum(), "logp_accuracy": ahead(decisive).sum()}
        found |= {"raw_accuracy": ahead(raw.margin()).sum()}
    if rewards is not None:
        return found | reward_metrics(rewards)
    return found | {"accuracy": ahead(decisive).sum()}


@torch.no_grad()
def reward_metrics(rewards: AnswerValues) -> dict[str, Tensor]:
    """What is logged of the rewards of pairs, as sums over them."""
    margin = rewards.margin()
    return {
        "reward_margin": margin.sum(),
        "chosen_reward": rewards.chosen.sum(),
        "reject_reward": rewards.reject.sum(),
        "accuracy": ahead(margin).sum(),
    }
