"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347): what is minimised over tokens of sampled answers.

With rho = policy / sampler of a token, A its advantage, V its value, V_old the value when it was sampled, R its return:

    max(-rho A, -clip(rho, 1 - c, 1 + c) A)              equation 7; for A < 0 at most -d A with a dual clip d
                                                         (Ye et al., arXiv 1912.09729, equation 3)
    1/2 max((V - R)^2, (clip(V, V_old -+ c_v) - R)^2)    the value's error, clipped as in OpenAI's baselines

The loss is the mean over tokens of the first + vf_coef * the second - entropy_coef * the entropy.

Legend: A tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
