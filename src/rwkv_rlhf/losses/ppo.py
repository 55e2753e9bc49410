"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347): what is minimised over tokens of sampled answers.

With rho = policy / sampler of a token, A its advantage, V its value, V_old the value when it was sampled, R its return:

    max(-rho A, -clip(rho, 1 - c, 1 + c) A)              equation 7; for A < 0 at most -d A with a dual clip d
                                                         (Ye et al., arXiv 1912.09729, equation 3)
    1/2 max((V - R)^2, (clip(V, V_old -+ c_v) - R)^2)    the value's error, clipped as in OpenAI's baselines

The loss is the mean over tokens of the first + vf_coef * the second - entropy_coef * the entropy.

Legend: A tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.data.policy_batch import PolicyBatch
from rwkv_rlhf.losses.kinds import Loss, LossValue
from rwkv_rlhf.losses.tokens import RequiredStats, TokenScores
from rwkv_rlhf.settings.config import Config


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: float, dual_clip: float = 0.0) -> Tensor:
    """The policy's loss at each token (A,), of ratios policy / sampler (A,) and constant advantages (A,).

    dual_clip: at most that many times -A where A < 0, so that a token which became far likelier than it was and then
    proved bad does not decide the step; 0 = off, otherwise above 1 (3 in the paper).
    """
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)
    if not dual_clip:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clipped_value_error(values: Tensor, sampled: Tensor, returns: Tensor, clip: float) -> Tensor:
    """The value's loss at each token (A,), of values (A,), those at sampling (A,) and returns (A,); clip 0 = off."""
    error = (values - returns).square()
    if clip:
        near = sampled + (values - sampled).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether the clip decides at each token (A,) bool: the policy has gone further than it lets count."""
    return ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))


@dataclass(frozen=True, kw_only=True)
class ValueBatch(PolicyBatch):
    """Sampled answers with what a value head thought of them.

    Attributes:
        old_values: (A,) float32 values before each token, at sampling. returns: (A,) float32, what they should have
            been. Both are None until they are known.
    """

    old_values: Tensor | None = None
    returns: Tensor | None = None


class PPO(Loss[ValueBatch]):
    """Metrics: loss, value_loss, and means over trained tokens: clip_fraction, update_kl."""

    def required_stats(self, config: Config) -> RequiredStats:
        return super().required_stats(config)._replace(entropy=config.entropy_coef > 0)

    def __call__(self, scores: TokenScores, batch: ValueBatch, config: Config) -> LossValue:
        assert scores.scalar is not None, "PPO without a value head"
        assert batch.old_values is not None and batch.returns is not None, "PPO without values at sampling"
        trained = batch.targets != IGNORE
        old = scores.logp.detach() if batch.old_logp is None else batch.old_logp
        behind = old - scores.logp
        ratio = torch.where(trained, -behind, 0.0).exp()
        policy = clipped_surrogate(ratio, batch.advantages, config.cliprange, config.dual_clip)
        error = clipped_value_error(scores.scalar, batch.old_values, batch.returns, config.cliprange_value)
        values = policy + config.vf_coef * error
        if config.entropy_coef:
            assert scores.entropy is not None
            values = values - config.entropy_coef * scores.entropy
        logged = {
            "loss": values,
            "value_loss": error,
            "clip_fraction": clipped(ratio, batch.advantages, config.cliprange).to(values.dtype),
            "update_kl": behind,
        }
        share = batch.total / batch.trained_total  # sums over answers become means over the step's tokens

        def mean(tokens: Tensor) -> Tensor:
            return torch.where(trained, tokens, 0.0).sum() * share

        return LossValue(mean(values), {name: mean(tokens.detach()) for name, tokens in logged.items()})
