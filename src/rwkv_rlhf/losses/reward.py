"""Reward models: one number r for a whole answer, so that the better of two answers has the larger one.

    -log sigmoid(r_c - r_r - m) + centring * (r_c + r_r)^2

The first term is that of Ouyang et al., arXiv 2203.02155, equation 1 (Bradley and Terry). m is 0, or with --rm_margin 1
how much the file rates the chosen answer higher (Touvron et al., arXiv 2307.09288, equation 2). The second term keeps
rewards near zero, which a difference of rewards leaves open (Eisenstein et al., arXiv 2312.09244, section 3).

r is what a scalar head makes of the hidden state after the answer's last token (`layers/scalar_head.py`).

Legend: n pairs, A answer tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.data.batch import JudgedBatch
from rwkv_rlhf.losses.kinds import Loss, LossValue
from rwkv_rlhf.losses.pairs import AnswerValues, reward_metrics
from rwkv_rlhf.losses.tokens import LOGP_ONLY, RequiredStats, TokenScores
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.settings.config import Config


def reward_loss(rewards: AnswerValues, margins: Tensor | None, centring: float) -> Tensor:
    """Loss (n,) of rewards (n,) each, by the formula above; `margins` (n,), None = 0."""
    ahead = rewards.margin() if margins is None else rewards.margin() - margins
    value = -F.logsigmoid(ahead)
    return value + centring * (rewards.chosen + rewards.reject).square() if centring else value


def answer_scores(scalar: Tensor, segments: Starts) -> Tensor:
    """(S,) the numbers in `scalar` (A,) after the last token of each answer; none may be empty."""
    return scalar.index_select(0, segments.last_on(scalar.device))


class RewardLoss(Loss[JudgedBatch]):
    """Metrics: loss and those of `reward_metrics`."""

    def required_stats(self, config: Config) -> RequiredStats:
        """Nothing of the vocabulary: no token is predicted."""
        return LOGP_ONLY

    def __call__(self, scores: TokenScores, batch: JudgedBatch, config: Config) -> LossValue:
        assert scores.scalar is not None, "a reward model without a score head"
        each = answer_scores(scores.scalar, batch.segments)
        rewards = AnswerValues(each[0::2], each[1::2])
        margins = batch.margins.to(each.dtype) if config.rm_margin else None
        value = reward_loss(rewards, margins, config.rm_centring).sum()
        return LossValue(value, {"loss": value.detach()} | reward_metrics(rewards))
