"""Odds ratio preference optimisation (Hong, Lee, Thorne, arXiv 2403.07691, equations 4-7).

With s the mean log-probability of an answer's tokens, odds = exp(s) / (1 - exp(s)):

    CE(chosen) + alpha * -log sigmoid(log odds_c - log odds_r),    log odds = s - log(1 - exp(s))

Mode "sum" takes summed log-probabilities for s, with alphas near 0.0005 that were tuned that way; CE stays a mean.

Legend: n pairs.
"""

import math

import torch
from torch import Tensor

from rwkv_rlhf.losses.kinds import PairLoss, TermWeights
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores
from rwkv_rlhf.settings.config import Config

CEILING = -1e-6  # log-probabilities above this would make the odds infinite


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, equation 7)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds(score: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p = score (n,), which is clamped to at most -1e-6."""
    score = score.clamp(max=CEILING)
    return score - log1mexp(score)


class ORPO(PairLoss):
    """CE(chosen) + orpo_alpha * odds-ratio loss. Rewards: log odds, so that `reward_margin` is the log odds ratio."""

    term = "orpo"

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        """Raises ValueError for a mode other than mean and sum."""
        if config.orpo_mode not in ("mean", "sum"):
            raise ValueError(f"--orpo_mode {config.orpo_mode} is unknown; choose mean or sum")
        if config.orpo_mode == "sum":
            return AnswerValues(log_odds(scores.chosen_sum), log_odds(scores.reject_sum))
        return AnswerValues(log_odds(scores.chosen_mean), log_odds(scores.reject_mean))

    def weights(self, config: Config) -> TermWeights:
        return TermWeights(preference=config.orpo_alpha, ce=1.0)
