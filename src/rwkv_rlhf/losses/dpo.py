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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import Metrics, PairLoss
from rwkv_rlhf.losses.pairs import PairScores, preference_metrics


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
    """dpo_alpha * CE(chosen) + preference loss; CE is the mean over the tokens of the pair's chosen answer.

    Metrics: loss and its parts `dpo` and `ce`, and those of `preference_metrics` with the rewards beta * (s - b).
    """

    needs_reference = True
    settings = ("dpo_beta", "dpo_alpha", "dpo_loss", "dpo_logp", "dpo_label_smoothing")

    def __call__(
        self,
        scores: PairScores,
        batch: Any,
        *,
        dpo_beta: float = 0.01,
        dpo_alpha: float = 0.1,
        dpo_loss: str = "sigmoid",
        dpo_logp: str = "sum",
        dpo_label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Metrics]:
        """`batch.reference` (n,2) float32 holds the reference's summed log-probabilities (chosen, reject)."""
        assert batch.reference is not None, "DPO without reference log-probabilities"
        chosen = scores.chosen_sum - batch.reference[:, 0]
        reject = scores.reject_sum - batch.reference[:, 1]
        if dpo_logp == "mean" or dpo_loss == "ipo":
            chosen = chosen / scores.chosen_count.clamp_min(1)
            reject = reject / scores.reject_count.clamp_min(1)
        preference = dpo(chosen - reject, dpo_beta, dpo_loss, dpo_label_smoothing).sum()
        entropy = -scores.chosen_mean().sum()
        value = preference + dpo_alpha * entropy if dpo_alpha else preference
        metrics = {"loss": value.detach(), "dpo": preference.detach(), "ce": entropy.detach()}
        return value, metrics | preference_metrics(scores, dpo_beta * chosen, dpo_beta * reject)
