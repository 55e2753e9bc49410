"""Advantages against the sums that the papers define, written out term by term in float64."""

import pytest
import torch

from rwkv_rlhf.rl.advantages import explained_variance, gae, token_rewards, whiten

LENGTHS = (5, 1, 3)
STARTS = torch.tensor([0, 5, 6, 9])


def numbers(seed):
    return torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_are_the_discounted_sum_of_errors(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} within the answer (arXiv 1506.02438, equation 16): an advantage that runs
    over an answer's end would credit a token with somebody else's reward."""
    rewards, values = numbers(1), numbers(2)
    found = gae(rewards, values, STARTS, gamma=gamma, lam=lam)
    begin = 0
    for length in LENGTHS:
        r, v = rewards[begin : begin + length].tolist(), [*values[begin : begin + length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert float(found.advantages[begin + t]) == pytest.approx(want, rel=1e-12)
            assert float(found.returns[begin + t]) == pytest.approx(want + v[t], rel=1e-12)
        begin += length


def test_returns_with_lambda_one_are_rewards_to_go():
    """With lam 1 the values cancel: a return is what is still to come, whatever the values say."""
    rewards = numbers(3)
    found = gae(rewards, numbers(4), STARTS, gamma=1.0, lam=1.0)
    want = torch.cat([part.flip(0).cumsum(0).flip(0) for part in rewards.split(LENGTHS)])
    torch.testing.assert_close(found.returns, want)


def test_score_stands_at_the_last_token():
    """-coef * (logp - reference) everywhere, the score where the answer ends, by hand."""
    divergence = torch.tensor([0.5, -0.25, 1.0, 2.0])
    found = token_rewards(torch.tensor([3.0, -1.0]), divergence, torch.tensor([0, 3, 4]), 0.1)
    torch.testing.assert_close(found, torch.tensor([-0.05, 0.025, 2.9, -1.2]))


@pytest.mark.parametrize("shift", [True, False])
def test_whitened_numbers(shift):
    """Mean 0 and standard deviation 1, or the mean that they had: the step size would follow the scale of rewards."""
    values = numbers(5) * 7 + 3
    found = whiten(values, shift=shift)
    torch.testing.assert_close(found.std(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean(), torch.zeros((), dtype=torch.float64) if shift else values.mean())
    assert bool((whiten(torch.full((4,), 2.5)) == 0).all())  # nothing to tell apart: no step, not a NaN


def test_explained_variance():
    """1 of perfect values, 0 of a constant, 0 (not a NaN) where there is nothing to explain."""
    returns = numbers(6)
    assert explained_variance(returns, returns) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 4.0), returns) == pytest.approx(0, abs=1e-12)
    half = returns * 0.5
    want = 1 - float((returns - half).var(correction=0) / returns.var(correction=0))
    assert explained_variance(half, returns) == pytest.approx(want)
    assert explained_variance(returns, torch.ones_like(returns)) == 0
