"""From rewards to advantages, for PPO: one number for each sampled token, answers end to end.

Legend: S answers, A tokens of all of them, starts (S+1,) cumulative lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-8  # beside a variance that may be 0


class Gae(NamedTuple):
    """Of each token (A,): its advantage, and the return that its value should have been."""

    advantages: Tensor
    returns: Tensor


def token_rewards(scores: Tensor, divergence: Tensor, starts: Tensor, coef: float) -> Tensor:
    """Rewards (A,): -coef * divergence of each token, and the answer's score (S,) at its last one.

    divergence (A,): log policy - log reference of the sampled tokens (Ziegler et al., arXiv 1909.08593, equation 2).
    """
    rewards = -coef * divergence
    ends = starts[1:].to(rewards.device) - 1
    return rewards.index_add(0, ends, scores.to(rewards))


def gae(rewards: Tensor, values: Tensor, starts: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Gae:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equations 11, 12 and 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}

    Both are 0 behind an answer's last token: an answer that was cut short is worth what its score says. Without a
    gradient; dtype and device of `values` (A,).
    """
    with torch.no_grad():
        rows, inside = _rows(starts.to(values.device), len(values))
        reward, value = (torch.where(inside, x[rows], 0.0) for x in (rewards.to(values), values))
        following = torch.zeros_like(value[:, 0])
        after = torch.zeros_like(following)  # the value of the next token
        found = torch.zeros_like(value)
        for t in range(value.shape[1] - 1, -1, -1):  # behind an answer's end all three are 0
            delta = reward[:, t] + gamma * after - value[:, t]
            following = delta + gamma * lam * following
            after = value[:, t]
            found[:, t] = following
        advantages = found[inside]  # row by row: answers end to end again
        return Gae(advantages, advantages + values)


def _rows(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Indices (S, L) of the tokens of each answer, and which of them are inside it; L is the longest answer."""
    lengths = starts.diff()
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=starts.device)
    inside = steps < lengths[:, None]
    return (starts[:-1, None] + steps).clamp(max=max(tokens - 1, 0)), inside


def whiten(values: Tensor, *, shift: bool = True) -> Tensor:
    """`values` (A,) with mean 0 and variance 1; without `shift` the mean stays.

    The variance is the unbiased one, and 1e-8 is added to it, as in Ziegler et al.'s program. They are to be the tokens
    of all ranks, as a rollout has them.
    """
    wide = values.double()
    mean = wide.mean()
    scaled = (wide - mean) / ((wide - mean).square().sum() / max(len(wide) - 1, 1) + EPSILON).sqrt()
    return (scaled if shift else scaled + mean).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) of tokens (A,): 1 = values foretell the returns, 0 = no better than a
    constant. 0 where all returns are the same."""
    variance = float(returns.double().var(correction=0))
    left = float((returns - values).double().var(correction=0))
    return 1 - left / variance if variance > EPSILON else 0.0
