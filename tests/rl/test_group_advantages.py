"""Advantages from a group's rewards, against the papers' formulas in plain Python, and TRL where it has a function."""

import statistics

import pytest
import torch

from rwkv_rlhf.rl.group_advantages import group_advantages, mixed, overlong_penalty
from rwkv_rlhf.settings.policy_tables import ADVANTAGES, SCALES

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, -1.0, 0.0, 2.0]]


def by_hand(name, scale):
    """One number after the other."""
    every = [reward for group in REWARDS for reward in group]
    found = []
    for group in REWARDS:
        mean, row = sum(group) / len(group), []
        for number, reward in enumerate(group):
            if name == "rloo":
                others = group[:number] + group[number + 1 :]
                row.append(reward - sum(others) / len(others))
            elif name == "maxrl":
                row.append((reward - mean) / (mean + 1e-6))
            else:
                deviation = {"group": statistics.stdev(group), "batch": statistics.stdev(every), "none": 1 - 1e-4}[
                    scale
                ]
                row.append((reward - mean) / (deviation + 1e-4))
        found.append(row)
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_papers_formula(name, scale):
    """If this breaks, a run learns from other numbers than its flags say."""
    found = group_advantages(torch.tensor(REWARDS), name, scale)
    torch.testing.assert_close(found, torch.tensor(by_hand(name, scale)), rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_rewards_teaches_nothing():
    """Its advantages are 0, not rounding divided by 1e-4, and dynamic sampling replaces it."""
    rewards = torch.full((1, 3), 0.1)
    for name in ADVANTAGES:
        assert group_advantages(rewards, name, "group").abs().max() < 1e-3
    assert mixed(torch.tensor(REWARDS)).tolist() == [True, False, True]


def test_the_soft_penalty_of_long_answers():
    """DAPO's equation 13: nothing up to 80 of 100 tokens, then down to -1; as TRL's own function has it."""
    lengths = [1, 80, 81, 90, 100]
    found = overlong_penalty(torch.tensor(lengths), 100, 20).tolist()
    assert found == pytest.approx([0, 0, -0.05, -0.5, -1])
    rewards = pytest.importorskip("trl.rewards", reason="trl is not installed")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert found == pytest.approx(theirs([[1] * length for length in lengths]))
