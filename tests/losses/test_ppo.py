"""PPO's losses against the papers' formulas, token by token in plain numbers."""

import itertools

import pytest
import torch

from rwkv_rlhf.losses.ppo import clipped, clipped_surrogate, clipped_value_error

RATIOS = (0.2, 0.79, 0.81, 1.0, 1.19, 1.21, 5.0)
ADVANTAGES = (-2.0, -0.1, 0.0, 0.1, 2.0)
POINTS = list(itertools.product(RATIOS, ADVANTAGES))


@pytest.mark.parametrize("dual", [0.0, 3.0])
def test_policy_loss_is_the_papers_objective(dual):
    """-min(rho A, clip(rho) A), for A < 0 not below the dual clip's floor: max(min(...), d A) in the paper's signs. A
    wrong side of the clip rewards a policy for running away."""
    ratio, advantage = torch.tensor(POINTS, dtype=torch.float64).unbind(1)
    found = clipped_surrogate(ratio, advantage, 0.2, dual)
    for (rho, a), loss in zip(POINTS, found.tolist()):
        objective = min(rho * a, min(max(rho, 0.8), 1.2) * a)
        if dual and a < 0:
            objective = max(objective, dual * a)
        assert loss == pytest.approx(-objective)


def test_no_gradient_where_the_clip_decides():
    """The trust region: a token that is already 20% likelier and was good pushes no further, and neither does one that
    is 20% less likely and was bad. `clipped` names exactly those."""
    ratio, advantage = torch.tensor(POINTS, dtype=torch.float64).unbind(1)
    ratio.requires_grad_()
    (slope,) = torch.autograd.grad(clipped_surrogate(ratio, advantage, 0.2).sum(), ratio)
    decided = clipped(ratio, advantage, 0.2)
    assert bool((slope[decided] == 0).all())
    assert bool((slope[~decided] == -advantage[~decided]).all())
    assert 0 < int(decided.sum()) < len(POINTS)


def test_value_error_is_the_worse_of_two():
    """1/2 max((V - R)^2, (clip(V) - R)^2): values may not leap in one rollout, however far the returns are."""
    points = list(itertools.product((-1.0, 0.05, 0.3, 2.0), (0.0, 0.25), (-3.0, 0.1, 4.0)))
    value, sampled, returns = torch.tensor(points, dtype=torch.float64).unbind(1)
    found = clipped_value_error(value, sampled, returns, 0.2).tolist()
    free = clipped_value_error(value, sampled, returns, 0.0).tolist()
    for (v, old, r), loss, unclipped in zip(points, found, free):
        near = min(max(v, old - 0.2), old + 0.2)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2))
        assert unclipped == pytest.approx(0.5 * (v - r) ** 2)
