"""PPO beside TRL 1.12.0, the last version that has it: what its trainer computes of the inputs below, in float64.

The lines of its `PPOTrainer.train` between the scores and the loss were run on these numbers, and what came out
stands here, as that version cannot be installed beside the current one; its variance is rounded to float32. The
answers have one length: of shorter ones TRL puts the score one place behind the last token, ours at it.
"""

from typing import NamedTuple

import pytest
import torch

from rwkv_rlhf.losses.kl import kl_estimate
from rwkv_rlhf.losses.ppo import clipped_surrogate, clipped_value_error
from rwkv_rlhf.rl.advantages import gae, token_rewards, whiten

ANSWERS, TOKENS = 3, 4
STARTS = torch.tensor([0, 4, 8, 12])
SCORES = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)


def spread(step):
    """n * step modulo 11, in elevenths, of the tokens n = 0 to 11, answers end to end."""
    return torch.tensor([n * step % 11 / 11 for n in range(ANSWERS * TOKENS)], dtype=torch.float64)


LOGP, REFERENCE, VALUES = -0.2 - 2 * spread(3), -0.3 - 2 * spread(5), spread(7) - 0.5
NEW_LOGP, NEW_VALUES = LOGP + 0.8 * (spread(4) - 0.5), VALUES + 1.2 * (spread(9) - 0.5)


class Theirs(NamedTuple):
    """KL of each answer, of some tokens the advantages and returns, and the losses of policy and values."""

    kl: tuple[float, ...]
    advantages: dict[int, float]
    returns: dict[int, float]
    policy: float
    value: float


TRL = {
    ("k1", False): Theirs(
        (0.581818181818182, 0.40000000000000036, 0.21818181818181803),
        {0: 1.443888002, 3: 0.945638252, 4: -1.399670864, 7: -0.888108894, 9: -0.498951109, 11: 0.278293563},
        {0: 1.143003448, 3: 1.661818182, 4: -0.538885379, 7: -0.229090909, 9: 0.348461428, 11: 0.23},
        0.033648757949151314,
        0.594783533555569,
    ),
    ("k1", True): Theirs(
        (0.581818181818182, 0.40000000000000036, 0.21818181818181803),
        {0: 1.160257265, 3: 1.373203583, 4: -1.447455245, 7: -0.830717746, 9: -0.329334698, 11: 0.095907287},
        {0: 1.900080958, 3: 3.116406625, 4: -1.316820788, 7: -0.517913152, 9: 0.478199715, 11: 0.364457755},
        0.051010170291360214,
        1.418297814335962,
    ),
    ("k3", False): Theirs(
        (0.7987533345514672, 2.325953902467619, 0.6617210553657846),
        {0: 1.421276206, 3: 0.756773061, 4: -1.257600223, 7: -1.130276281, 9: -0.417709092, 11: 0.484217396},
        {0: 1.124089678, 3: 1.412645109, 4: -0.832081054, 7: -0.804090748, 9: 0.13405583, 11: 0.249032516},
        0.038559313117230806,
        0.6332006966466099,
    ),
    ("k3", True): Theirs(
        (0.7987533345514672, 2.325953902467619, 0.6617210553657846),
        {0: 1.220200154, 3: 1.105885174, 4: -1.279965391, 7: -1.137342503, 9: -0.258446342, 11: 0.303964937},
        {0: 2.094993525, 3: 2.800017928, 4: -1.822659446, 7: -1.658968881, 9: 0.182697723, 11: 0.459399317},
        0.05067175349492095,
        1.797231611276648,
    ),
}


@pytest.mark.parametrize(("estimator", "whitened"), TRL)
def test_rewards_advantages_and_losses_are_trl_s(estimator, whitened):
    """KL 0.2, gamma 0.99, lambda 0.95, clips 0.2: if this breaks, PPO here is another algorithm than the one whose
    settings people bring along."""
    theirs = TRL[estimator, whitened]
    kl = kl_estimate(LOGP, REFERENCE, estimator)
    assert kl.reshape(ANSWERS, TOKENS).sum(1).tolist() == pytest.approx(theirs.kl, rel=1e-12)
    rewards = token_rewards(SCORES, kl, STARTS, 0.2)
    rewards = whiten(rewards, shift=False) if whitened else rewards
    found = gae(rewards, VALUES, STARTS, gamma=0.99, lam=0.95)
    advantages = whiten(found.advantages)
    assert {n: float(advantages[n]) for n in theirs.advantages} == pytest.approx(theirs.advantages, rel=1e-6)
    assert {n: float(found.returns[n]) for n in theirs.returns} == pytest.approx(theirs.returns, rel=1e-6)
    policy = clipped_surrogate((NEW_LOGP - LOGP).exp(), advantages, 0.2).mean()
    value = clipped_value_error(NEW_VALUES, VALUES, found.returns, 0.2).mean()
    assert float(policy) == pytest.approx(theirs.policy, rel=1e-6)
    assert float(value) == pytest.approx(theirs.value, rel=1e-6)
