"""PPO's losses against the papers' formulas, token by token in plain numbers."""

import itertools

import pytest
import torch

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.ppo import ValueBatch, clipped, clipped_surrogate, clipped_value_error
from tests.support.loss_cases import ANSWERS, config, head_and_hidden, policy_batch, probabilities, scalar_head

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


@pytest.mark.parametrize("entropy", [0.0, 0.05])
def test_the_whole_loss(entropy):
    """Mean over trained tokens of surrogate + vf_coef * value error - entropy_coef * entropy, value and gradients.

    From raw logits and single hidden states: a wrong shift would judge each token by its neighbour's value.
    """
    scalar = scalar_head("ppo")
    head, hidden = head_and_hidden(len(ANSWERS))
    _, p = probabilities(head, hidden)
    logp = p[torch.arange(len(ANSWERS)), ANSWERS.clamp(min=0)].log()
    old = logp.detach() + 0.3 * torch.randn(len(ANSWERS), dtype=torch.float64)
    batch = policy_batch(kind=ValueBatch, old_logp=old)
    chosen = config(loss="ppo", cliprange=0.2, cliprange_value=0.3, vf_coef=0.5, entropy_coef=entropy)
    truth = error = gone = cut = 0.0
    trained = [t for t in range(len(ANSWERS)) if ANSWERS[t] != IGNORE]
    for t in trained:
        rho, a = (logp[t] - old[t]).exp(), batch.advantages[t]
        value, was, wanted = hidden[t] @ scalar.weight[0], batch.old_values[t], batch.returns[t]
        near = was + (value - was).clamp(-0.3, 0.3)
        one = torch.maximum((value - wanted) ** 2, (near - wanted) ** 2) / 2
        truth = truth + torch.maximum(-rho * a, -rho.clamp(0.8, 1.2) * a) + 0.5 * one
        truth = truth + entropy * (p[t] * p[t].log()).sum()
        error, gone = error + one.item(), gone + (old[t] - logp[t]).item()
        cut += float((a > 0 and rho > 1.2) or (a < 0 and rho < 0.8))
    truth = truth / len(trained)
    found, metrics = LOSSES["ppo"].from_hidden(head, hidden, batch, chosen, scalar).per(batch.total)
    torch.testing.assert_close(found, truth)
    inputs = (head.weight, hidden, scalar.weight)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)):
        torch.testing.assert_close(a, b)
    want = {"value_loss": error, "update_kl": gone, "clip_fraction": cut}
    assert {name: float(metrics[name]) for name in want} == pytest.approx(
        {name: amount / len(trained) for name, amount in want.items()}
    )


def test_the_first_ratio_is_one():
    """Without log-probabilities of the sampler the pass that trains makes them: ratio 1, nothing clipped."""
    head, hidden = head_and_hidden(len(ANSWERS))
    batch = policy_batch(kind=ValueBatch, old_logp=None)
    _, metrics = LOSSES["ppo"].from_hidden(head, hidden, batch, config(loss="ppo"), scalar_head("ppo"))
    assert float(metrics["update_kl"]) == float(metrics["clip_fraction"]) == 0
