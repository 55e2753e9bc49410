"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens alone.

J. Schulman, "Approximating KL divergence" (2020). With d = log reference - log policy of a token that the policy drew:

    k1   -d              no bias; may be negative
    k2   d^2 / 2         little bias near the reference; its gradient is the divergence's
    k3   exp(d) - d - 1  no bias, never negative, less variance than k1

As a part of a loss only k2 has the right gradient at the policy that drew the tokens (k1's has a mean of 0, k3's is
that of the reverse divergence). Weighed by the ratio policy / sampler, whose gradient belongs to it, each unbiased
estimate has it, wherever the policy went since (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

Legend: A tokens.
"""

from __future__ import annotations

from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logp: Tensor, reference: Tensor, estimator: str = "k1") -> Tensor:
    """The estimate at each token (A,) in nats, of log-probabilities (A,) under policy and reference; differentiable.

    `estimator` is one of KL_ESTIMATORS.
    """
    behind = reference - logp
    if estimator == "k1":
        return -behind
    if estimator == "k2":
        return behind.square() / 2
    assert estimator == "k3", estimator
    return behind.exp() - behind - 1


def weighted_kl(logp: Tensor, reference: Tensor, sampled: Tensor, estimator: str = "k3") -> Tensor:
    """As `kl_estimate`, times the ratio policy / sampler of each token: with k1 or k3 value and gradient are unbiased.

    `sampled` (A,): log-probabilities under the policy that drew the tokens, a constant.
    """
    return (logp - sampled.detach()).exp() * kl_estimate(logp, reference, estimator)
