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

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import RatedBatch
from rwkv_rlhf.losses.kinds import Loss, LossValue, segment_penalty
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores, ahead, log_ratios, segment_sums
from rwkv_rlhf.losses.tokens import TokenScores
from rwkv_rlhf.settings.config import Config


def kto(ratio: Tensor, good: Tensor, divergence: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """Loss (n,) of the log-ratios r (n,), good (n,) bool, z a scalar, by the formulas above."""
    value = torch.sigmoid(beta * torch.where(good, ratio - divergence, divergence - ratio))
    return (1 - value) * torch.where(good, desirable, undesirable)


class KTO(Loss[RatedBatch]):
    """Metrics: loss and those of `rated_metrics`. Rewards: beta * (s - b)."""

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        """Of pairs, which are taken apart to train on; `accuracy` of them then compares both answers of a prompt."""
        ratio = log_ratios(scores, reference)
        return AnswerValues(config.kto_beta * ratio.chosen, config.kto_beta * ratio.reject)

    def __call__(self, scores: TokenScores, batch: RatedBatch, config: Config) -> LossValue:
        """`batch.kl` is z; `batch.total` and `batch.good_total` count the answers of the optimizer step."""
        assert batch.reference is not None and batch.kl is not None, "KTO without reference log-probabilities or z"
        sums = segment_sums(scores.logp, batch.segments)
        ratio, divergence = sums - batch.reference, batch.kl.detach().to(sums.dtype)
        weights = config.kto_desirable_weight, config.kto_undesirable_weight
        value = kto(ratio, batch.good, divergence, config.kto_beta, *weights).sum()
        metrics = {"loss": value.detach()}
        metrics |= rated_metrics(
            sums, batch.reference, batch.good, divergence, config.kto_beta, total=batch.total, good=batch.good_total
        )
        return LossValue(value, metrics).with_l2wrap(segment_penalty(scores, batch.targets, batch.segments))


@torch.no_grad()
def rated_metrics(
    sums: Tensor, reference: Tensor, is_good: Tensor, divergence: Tensor, beta: float, *, total: float, good: float
) -> dict[str, Tensor]:
    """What is logged of rated answers, in training and held out alike; names and units as in `settings/metrics.py`.

    They are sums over the answers, which divided by `total` give means. A mean over good answers only, or over bad ones
    only, is left out where there are none, and the margins with it.

    sums, reference (n,): summed log-probabilities of the policy and the reference. is_good (n,) bool. divergence (): z.
    total, good: all answers, and good ones, that the means are over.
    """
    reward = beta * (sums - reference)
    own_side = torch.where(is_good, 1.0, -1.0).to(reward.dtype) * (reward - beta * divergence)
    found = {"accuracy": ahead(own_side).sum(), "kto_kl": divergence * len(is_good)}
    for side, mask, count in (("chosen", is_good, good), ("reject", ~is_good, total - good)):
        if count:
            found[f"{side}_reward"] = (reward * mask).sum() * (total / count)
            found[f"{side}_logp"] = (sums * mask).sum() * (total / count)
    if 0 < good < total:
        found["reward_margin"] = found["chosen_reward"] - found["reject_reward"]
        found["logp_margin"] = found["reward_margin"] / beta
    return found
