"""Kahneman-Tversky optimisation of single answers that are known to be good or bad (Ethayarajh et al., arXiv
2402.01306, equations 7-8).

With s and b the policy's and the reference's summed log-probability of an answer, r = s - b:

    good    lambda_D (1 - sigmoid(beta (r - z)))
    bad     lambda_U (1 - sigmoid(beta (z - r)))

z estimates KL(policy || reference): the mean of r over answers put to prompts that they do not belong to, at least 0
and without gradient. The paper takes the mismatched answers of the batch; here they are those of the whole optimizer
step, so that accumulation changes nothing, and each answer keeps its other prompt, so that its reference score is
computed once. Defaults: beta 0.1, both weights 1; the paper advises weights with lambda_D n_good : lambda_U n_bad
between 1 and 4/3.

Legend: n answers.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.losses.kinds import Loss, Metrics
from rwkv_rlhf.losses.pairs import TIE, segment_sums
from rwkv_rlhf.losses.tokens import TokenScores


def kto(ratio: Tensor, good: Tensor, divergence: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """Loss (n,) of the log-ratios r (n,), good (n,) bool, z a scalar, by the formulas above."""
    value = torch.sigmoid(beta * torch.where(good, ratio - divergence, divergence - ratio))
    return (1 - value) * torch.where(good, desirable, undesirable)


class KTO(Loss):
    """Metrics: loss, `kl` (z), `accuracy` (good answers with r > z and bad ones with r < z; a tie counts one half),
    `margin` (mean of beta (r - z), with the sign of the label), and the mean rewards beta r of good and bad answers."""

    kind = "rated"
    needs_reference = True
    settings = ("kto_beta", "kto_desirable_weight", "kto_undesirable_weight")

    def from_scores(self, scores: TokenScores, batch: Any, *, l2wrap: bool, **settings: Any) -> tuple[Tensor, Metrics]:
        """Segments of the scores are answers, `batch.starts` (n+1,)."""
        value, metrics = self(segment_sums(scores.logp, batch.starts), batch, **settings)
        if l2wrap:
            penalty = self.penalty(scores.max_logit, batch.targets, batch.starts)
            value, metrics = value + penalty, metrics | {"l2wrap": penalty.detach()}
        return value, metrics

    def __call__(
        self,
        scores: Tensor,
        batch: Any,
        *,
        kto_beta: float = 0.1,
        kto_desirable_weight: float = 1.0,
        kto_undesirable_weight: float = 1.0,
    ) -> tuple[Tensor, Metrics]:
        """scores (n,) summed log-probabilities. `batch` has `reference` (n,), `good` (n,) bool, `kl` a scalar, and
        `good_total`, the good answers of the optimizer step of `total` answers."""
        assert batch.reference is not None, "KTO without reference log-probabilities"
        good, ratio = batch.good, scores - batch.reference
        divergence = batch.kl.detach().to(ratio.dtype)
        value = kto(ratio, good, divergence, kto_beta, kto_desirable_weight, kto_undesirable_weight).sum()
        reward = kto_beta * ratio.detach()
        sign = torch.where(good, 1.0, -1.0).to(reward.dtype)
        margin = sign * (reward - kto_beta * divergence)
        right = (margin > 0).to(margin.dtype).masked_fill(margin.abs() < TIE, 0.5)
        metrics = {"loss": value.detach(), "accuracy": right.sum(), "margin": margin.sum()}
        metrics["kl"] = divergence * len(good)  # sums over answers, as every metric
        for name, mask, count in (
            ("chosen_reward", good, batch.good_total),
            ("reject_reward", ~good, batch.total - batch.good_total),
        ):
            if count:
                metrics[name] = (reward * mask).sum() * (batch.total / count)
        return value, metrics
