"""Odds ratio preference optimisation (Hong, Lee, Thorne, arXiv 2403.07691, equations 4-7).

With s the mean log-probability of an answer's tokens, odds = exp(s) / (1 - exp(s)):

    CE(chosen) + alpha * -log sigmoid(log odds_c - log odds_r),    log odds = s - log(1 - exp(s))

Mode "sum" takes summed log-probabilities for s, with alphas near 0.0005 that were tuned that way; CE stays a mean.

Legend: n pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import Metrics, PairLoss
from rwkv_rlhf.losses.pairs import PairScores, preference_metrics

CEILING = -1e-6  # log-probabilities above this would make the odds infinite


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, equation 7)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds(score: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p = score (n,), which is clamped to at most -1e-6."""
    score = score.clamp(max=CEILING)
    return score - log1mexp(score)


class ORPO(PairLoss):
    """CE(chosen) + orpo_alpha * odds-ratio loss; CE is the mean over the tokens of the pair's chosen answer.

    Metrics: loss and its parts `ce` and `odds` (before alpha), and those of `preference_metrics` with log odds as the
    rewards, so that `margin` is the log odds ratio.
    """

    settings = ("orpo_alpha", "orpo_mode")

    def __call__(
        self, scores: PairScores, batch: Any, *, orpo_alpha: float = 0.01, orpo_mode: str = "mean"
    ) -> tuple[Tensor, Metrics]:
        """Raises ValueError for a mode other than mean and sum."""
        if orpo_mode not in ("mean", "sum"):
            raise ValueError(f"--orpo_mode {orpo_mode} is unknown; choose mean or sum")
        means = scores.chosen_mean(), scores.reject_mean()
        chosen, reject = means if orpo_mode == "mean" else (scores.chosen_sum, scores.reject_sum)
        chosen, reject = log_odds(chosen), log_odds(reject)
        entropy = -means[0].sum()
        odds = -F.logsigmoid(chosen - reject).sum()
        value = entropy + orpo_alpha * odds
        metrics = {"loss": value.detach(), "ce": entropy.detach(), "odds": odds.detach()}
        return value, metrics | preference_metrics(scores, chosen, reject)
