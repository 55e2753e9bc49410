"""Direct preference optimisation and its variants.

With s the policy's and b the reference's log-probability of an answer (sums over its tokens, or means):

    h = (s_c - s_r) - (b_c - b_r)
    sigmoid   -log sigmoid(beta h)        Rafailov et al., arXiv 2305.18290, equation 7
    hinge     max(0, 1 - beta h)          Zhao et al. (SLiC-HF), arXiv 2305.10425; in this form Liu et al. (RSO),
                                          arXiv 2309.06657, section 3
    ipo       (h - 1 / (2 beta))^2        Azar et al., arXiv 2310.12036, equation 17, with tau = beta; on means over
                                          the answer's tokens, as its authors later advised
    robust    unbiased under swapped labels, Chowdhury et al. (rDPO), arXiv 2403.00409:
              ((1 - eps) l(beta h) - eps l(-beta h)) / (1 - 2 eps), l = -log sigmoid

Label smoothing eps, the share of pairs thought to be swapped, makes sigmoid, hinge and ipo the expectation
(1 - eps) l(h) + eps l(-h) (for sigmoid: conservative DPO, Mitchell's note of 2023).

Legend: n pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import PairLoss, TermWeights
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores, log_ratios
from rwkv_rlhf.settings.config import Config


def _logistic(h: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(beta * h)


def _hinge(h: Tensor, beta: float) -> Tensor:
    return torch.relu(1 - beta * h)


def _square(h: Tensor, beta: float) -> Tensor:
    return (h - 1 / (2 * beta)).square()


VARIANTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": _logistic,
    "hinge": _hinge,
    "ipo": _square,
    "robust": _logistic,
}


def dpo(h: Tensor, beta: float, variant: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Preference loss (n,) of the log-ratio differences h (n,), by the formulas above.

    Raises ValueError for an unknown variant, beta <= 0, or a label smoothing outside [0, 0.5).
    """
    if variant not in VARIANTS:
        raise ValueError(f"--dpo_loss {variant} is unknown; choose one of {', '.join(VARIANTS)}")
    if not beta > 0:
        raise ValueError(f"--dpo_beta is {beta}; it must be above 0")
    eps = label_smoothing
    if not 0 <= eps < 0.5:
        raise ValueError(f"--dpo_label_smoothing is {eps}; it must be at least 0 and below 0.5")
    loss = VARIANTS[variant]
    if eps == 0:
        return loss(h, beta)
    if variant == "robust":
        return ((1 - eps) * loss(h, beta) - eps * loss(-h, beta)) / (1 - 2 * eps)
    return (1 - eps) * loss(h, beta) + eps * loss(-h, beta)


class DPO(PairLoss):
    """Preference loss + dpo_alpha * CE(chosen). Rewards: beta * (s - b)."""

    term = "dpo"

    @staticmethod
    def ratios(scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        """s - b of each answer, in nats: of sums over its tokens, or of means."""
        ratio = log_ratios(scores, reference)
        if config.dpo_logp == "mean" or config.dpo_loss == "ipo":
            chosen_count, reject_count = scores.chosen_count.clamp_min(1), scores.reject_count.clamp_min(1)
            return AnswerValues(ratio.chosen / chosen_count, ratio.reject / reject_count)
        return ratio

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        ratio = self.ratios(scores, reference, config)
        return AnswerValues(config.dpo_beta * ratio.chosen, config.dpo_beta * ratio.reject)

    def preference(self, scores: PairScores, reference: Tensor | None, config: Config) -> Tensor:
        h = self.ratios(scores, reference, config).margin()
        return dpo(h, config.dpo_beta, config.dpo_loss, config.dpo_label_smoothing)

    def weights(self, config: Config) -> TermWeights:
        return TermWeights(preference=1.0, ce=config.dpo_alpha or 0.0)
