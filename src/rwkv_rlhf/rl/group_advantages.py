"""Advantages of answers from the rewards of their group: no value function is learnt.

    group    r - mean of the group                        Shao et al. (GRPO), arXiv 2402.03300, section 4.1.2
    rloo     r - mean of the others in the group          Ahmadian et al., arXiv 2402.14740, equation 5
    maxrl    (r - mean) / (mean + 1e-6)                   arXiv 2602.02710

`group` may be divided by the deviation of the group (GRPO), of all answers of the rollout, or not at all (Dr. GRPO, Liu
et al., arXiv 2503.20783: dividing favours questions that are nearly always, or nearly never, answered). Deviations are
unbiased (n - 1), with 1e-4 beside them, as TRL has it.

Legend: n groups, G answers of each.
"""

from __future__ import annotations

from torch import Tensor

from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.policy_tables import ADVANTAGES, SCALES

BESIDE_DEVIATION = 1e-4
BESIDE_MEAN = 1e-6


def centred(rewards: Tensor) -> Tensor:
    """(n, G) rewards -> how far each is above the mean of its group."""
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out(rewards: Tensor) -> Tensor:
    """(n, G) rewards -> how far each is above the mean of the others of its group; G is at least 2."""
    size = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (size - 1)
    return rewards - others


def over_the_mean(rewards: Tensor) -> Tensor:
    """(n, G) rewards >= 0 -> distance from the group's mean in multiples of it: rare successes weigh more."""
    mean = rewards.mean(1, keepdim=True)
    return (rewards - mean) / (mean + BESIDE_MEAN)


def per_group(advantages: Tensor, rewards: Tensor) -> Tensor:
    """(n, G) divided by the deviation of each group's rewards (n, G)."""
    return advantages / (rewards.std(1, keepdim=True) + BESIDE_DEVIATION)


def per_rollout(advantages: Tensor, rewards: Tensor) -> Tensor:
    """(n, G) divided by the deviation of all rewards (n, G)."""
    return advantages / (rewards.std() + BESIDE_DEVIATION)


def unscaled(advantages: Tensor, rewards: Tensor) -> Tensor:
    """(n, G) as they are."""
    return advantages


def mixed(rewards: Tensor) -> Tensor:
    """(n,) bool: whether the answers of a group have different rewards, so that it has something to teach."""
    return rewards.amax(1) > rewards.amin(1)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """What is added to the rewards of answers of so many tokens: from 0 at longest - buffer to -1 at `longest`.

    DAPO (arXiv 2503.14476, equation 13). The shape of `lengths`, float32.
    """
    over = (lengths.float() - (longest - buffer)).clamp(0, buffer)
    return -over / buffer


def group_advantages(rewards: Tensor, name: str, scale: str) -> Tensor:
    """(n, G) rewards -> (n, G) advantages, by the names of ADVANTAGES and SCALES; the scale counts where it applies."""
    facts = ADVANTAGES[name]
    found: Tensor = load(facts.implementation)(rewards)
    return load(SCALES[scale].implementation)(found, rewards) if facts.scaled else found
