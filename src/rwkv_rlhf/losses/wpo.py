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

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import PairLoss, TermWeights
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores, log_ratios
from rwkv_rlhf.losses.tokens import RequiredStats
from rwkv_rlhf.settings.config import Config


def pair_weight(scores: PairScores) -> Tensor:
    """w(y_c) w(y_r) of each pair, (n,), at most 1 and without a gradient."""
    assert scores.log_weight is not None, "WPO without the weights of pairs"
    return scores.log_weight.detach().exp().clamp(max=1)


def wpo(margin: Tensor, weight: Tensor) -> Tensor:
    """Preference loss (n,) of the margins of rewards (n,) and the pairs' weights (n,)."""
    return -(weight * F.logsigmoid(margin))


class WPO(PairLoss):
    """Weighted DPO + wpo_alpha * CE(chosen). Rewards: beta * (s - b). One metric more: `pair_weight`."""

    term = "wpo"

    def required_stats(self, config: Config) -> RequiredStats:
        return super().required_stats(config)._replace(square=True)

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        ratio = log_ratios(scores, reference)
        return AnswerValues(config.wpo_beta * ratio.chosen, config.wpo_beta * ratio.reject)

    def preference(self, scores: PairScores, reference: Tensor | None, config: Config) -> Tensor:
        return wpo(self.rewards(scores, reference, config).margin(), pair_weight(scores))

    def metrics(self, scores: PairScores, reference: Tensor | None, config: Config) -> dict[str, Tensor]:
        return super().metrics(scores, reference, config) | {"pair_weight": pair_weight(scores).sum()}

    def weights(self, config: Config) -> TermWeights:
        return TermWeights(preference=1.0, ce=config.wpo_alpha)
