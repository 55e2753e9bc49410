"""Estimates of a divergence from samples, against the divergence itself in float64."""

import pytest
import torch

from rwkv_rlhf.losses.kl import KL_ESTIMATORS, kl_estimate, weighted_kl

V = 7


def distributions():
    """Logits of a policy that learns, of its reference and of an older policy that drew the tokens."""
    generator = torch.Generator().manual_seed(4)
    policy, reference, sampler = (torch.randn(V, generator=generator, dtype=torch.float64) * 0.5 for _ in range(3))
    return policy.requires_grad_(), reference.log_softmax(0), sampler.log_softmax(0)


def divergence(policy, reference):
    """sum_v p(v) log(p(v) / q(v))."""
    logp = policy.log_softmax(0)
    return (logp.exp() * (logp - reference)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimates_have_the_divergence_as_their_mean(estimator):
    """A logged KL that is not KL would be compared with others' in vain: the exact expectation over all tokens."""
    policy, reference, _ = distributions()
    logp = policy.log_softmax(0)
    mean = (logp.exp() * kl_estimate(logp, reference, estimator)).sum()
    torch.testing.assert_close(mean, divergence(policy, reference))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_estimates_are_zero_for_equal_policies_and_k2_k3_never_negative(estimator):
    """At the first step, where the policy is its reference, no penalty may push it."""
    logp = torch.linspace(-9, -0.1, 20, dtype=torch.float64)
    assert bool((kl_estimate(logp, logp, estimator) == 0).all())
    other = logp.flip(0)
    assert estimator == "k1" or bool((kl_estimate(logp, other, estimator) >= 0).all())


def test_k2_has_the_gradient_of_the_divergence():
    """What the file's first lines say of gradients decides which estimator may stand in a loss."""
    policy, reference, _ = distributions()
    exact = torch.autograd.grad(divergence(policy, reference), policy)[0]
    logp = policy.log_softmax(0)
    weights = logp.exp().detach()  # the samples are drawn, not differentiated
    found = torch.autograd.grad((weights * kl_estimate(logp, reference, "k2")).sum(), policy)[0]
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighted_estimates_are_unbiased_far_from_the_sampler(estimator):
    """Several passes over one rollout must push toward the reference, not toward where the samples came from."""
    policy, reference, sampler = distributions()
    logp = policy.log_softmax(0)
    mean = (sampler.exp() * weighted_kl(logp, reference, sampler, estimator)).sum()
    exact = divergence(policy, reference)
    torch.testing.assert_close(mean, exact)
    found, wanted = (torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (mean, exact))
    torch.testing.assert_close(found, wanted)
