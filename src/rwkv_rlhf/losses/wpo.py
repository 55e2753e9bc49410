"""Weighted preference optimisation (Zhou et al., arXiv 2406.11827, equation 5): DPO that trusts pairs by how likely the
policy itself would have written them.

With s and b the policy's and the reference's summed log-probabilities, h = (s_c - s_r) - (b_c - b_r), |y| tokens:

    - w(y_c) w(y_r) log sigmoid(beta h) + alpha * CE(chosen)
    w(y) = exp(1/|y| sum_t (log p(y_t) - log sum_v p(v)^2))      ("sampled alignment", the authors' choice)

An answer that the policy samples has log p(y_t) = log sum_v p(v)^2 on average over p, thus a weight near 1. The product
of the weights is a constant (no gradient) and at most 1, as in the authors' code. The paper has alpha = 0, beta = 0.01.
(Older RWKV programs let gradients through the weight, which then drives both answers' likelihood down.)

Legend: n pairs.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import Metrics, PairLoss
from rwkv_rlhf.losses.pairs import PairScores, preference_metrics


class WPO(PairLoss):
    """Weighted DPO + wpo_alpha * CE(chosen).

    Metrics: loss and its parts `wpo` and `ce` (before alpha), `weight`, and those of `preference_metrics` with the
    rewards beta * (s - b).
    """

    needs_reference = True
    needs_weights = True
    settings = ("wpo_alpha", "wpo_beta")

    def __call__(
        self, scores: PairScores, batch: Any, *, wpo_alpha: float = 0.0, wpo_beta: float = 0.01
    ) -> tuple[Tensor, Metrics]:
        """`batch.reference` (n,2) float32 holds the reference's summed log-probabilities (chosen, reject)."""
        assert batch.reference is not None, "WPO without reference log-probabilities"
        chosen = wpo_beta * (scores.chosen_sum - batch.reference[:, 0])
        reject = wpo_beta * (scores.reject_sum - batch.reference[:, 1])
        weight = scores.log_weight.detach().exp().clamp(max=1)
        preference = -(weight * F.logsigmoid(chosen - reject)).sum()
        entropy = -scores.chosen_mean().sum()
        value = preference + wpo_alpha * entropy if wpo_alpha else preference
        metrics = {"loss": value.detach(), "wpo": preference.detach(), "ce": entropy.detach(), "weight": weight.sum()}
        return value, metrics | preference_metrics(scores, chosen, reject)
