"""From scores of tokens to scores of answers, and the metrics that every preference loss logs.

Legend: n pairs, A answer tokens (all answers end to end: chosen_0, reject_0, chosen_1, ...), S segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.losses.tokens import IGNORE

TIE = 1e-6  # a margin below this is none: an untrained adapter shows an accuracy of one half


class PairScores(NamedTuple):
    """Summed log-probabilities of both answers of each pair, (n,) float32, and their token counts, (n,) int64.

    `log_weight` (n,): where a loss asks for it, how much both answers look like the policy's own (see `wpo.py`).
    """

    chosen_sum: Tensor
    reject_sum: Tensor
    chosen_count: Tensor
    reject_count: Tensor
    log_weight: Tensor | None = None

    def chosen_mean(self) -> Tensor:
        """Mean log-probability of a token of the chosen answer, (n,); 0 for an answer without tokens."""
        return self.chosen_sum / self.chosen_count.clamp_min(1)

    def reject_mean(self) -> Tensor:
        """As `chosen_mean`, of the rejected answer."""
        return self.reject_sum / self.reject_count.clamp_min(1)


def pair_scores(logp: Tensor, targets: Tensor, starts: Tensor) -> PairScores:
    """Sums per answer of token log-probabilities `logp` (A,), which are 0 where `targets` (A,) is IGNORE.

    `starts` (2n+1,) int64: cumulative lengths of chosen_0, reject_0, chosen_1, ... Differentiable with respect to logp.
    """
    sums = segment_sums(logp, starts)
    counts = segment_sums((targets != IGNORE).double(), starts).long()
    return PairScores(sums[0::2], sums[1::2], counts[0::2], counts[1::2])


def log_weights(excess: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
    """(n,) sum over both answers of a pair of the mean over its tokens of `excess` (A,), 0 where not trained."""
    sums = segment_sums(excess, starts)
    counts = segment_sums((targets != IGNORE).to(excess.dtype), starts)
    means = sums / counts.clamp_min(1)
    return means[0::2] + means[1::2]


def segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sums (S,) of `values` (A,) between consecutive `starts` (S+1,); an empty segment gives 0.

    Added up in float64 and rounded once, so that an answer of a thousand tokens loses nothing.
    """
    sums = torch.segment_reduce(values.double(), "sum", lengths=starts.diff().to(values.device), initial=0.0)
    return sums.to(values.dtype)


def preference_metrics(scores: PairScores, chosen_reward: Tensor, reject_reward: Tensor) -> dict[str, Tensor]:
    """Detached sums over pairs: accuracy (a margin within TIE of 0 counts one half), margin = chosen_reward -
    reject_reward, both rewards, and both answers' summed log-probabilities."""
    margin = (chosen_reward - reject_reward).detach()
    right = (margin > 0).to(margin.dtype).masked_fill(margin.abs() < TIE, 0.5)
    return {
        "accuracy": right.sum(),
        "margin": margin.sum(),
        "chosen_reward": chosen_reward.detach().sum(),
        "reject_reward": reject_reward.detach().sum(),
        "chosen_logp": scores.chosen_sum.detach().sum(),
        "reject_logp": scores.reject_sum.detach().sum(),
    }
