"""Facts of what reinforcement learning has several of, as in `tables.py`: objectives of GRPO and kin, and advantages.

No torch: functions are named as "module:name".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveFacts:
    """How the tokens of sampled answers become one number (`losses/grpo.py`).

    mean: (values (A,), batch, config) -> the sum that, divided by the answers of the optimizer step, is the loss.
    ratio: (log-ratios (A,), batch) -> ratios (A,). surrogate: (ratios, logp, advantages, limits) -> values (A,).
    high: of the upper limit, where {grpo_epsilon_high} is not given; None = as {grpo_epsilon}.
    """

    help: str
    mean: str
    ratio: str = ".losses.grpo:token_ratio"
    surrogate: str = ".losses.grpo:clipped"
    high: float | None = None


GRPO_LOSSES: dict[str, ObjectiveFacts] = {
    "grpo": ObjectiveFacts(
        "mean over answers of the mean over their tokens (arXiv 2402.03300)", ".losses.grpo:mean_of_answers"
    ),
    "dapo": ObjectiveFacts(
        "mean over all tokens of the optimizer step (arXiv 2503.14476)", ".losses.grpo:mean_of_step"
    ),
    "dr_grpo": ObjectiveFacts(
        "sum over an answer's tokens divided by the longest length (arXiv 2503.20783)", ".losses.grpo:mean_of_length"
    ),
    "bnpo": ObjectiveFacts("mean over the tokens of each micro-batch", ".losses.grpo:mean_of_batch"),
    "cispo": ObjectiveFacts(
        "ratios are weights without a gradient, cut above (arXiv 2506.13585)",
        ".losses.grpo:mean_of_step",
        surrogate=".losses.grpo:cispo",
        high=5.0,
    ),
    "gspo": ObjectiveFacts(
        "one ratio for a whole answer (arXiv 2507.18071)",
        ".losses.grpo:mean_of_answers",
        ratio=".losses.grpo:answer_ratio",
    ),
}


@dataclass(frozen=True)
class AdvantageFacts:
    """implementation: rewards (n, G) -> advantages (n, G). scaled: whether {grpo_scale} divides them."""

    help: str
    implementation: str
    scaled: bool = False


ADVANTAGES: dict[str, AdvantageFacts] = {
    "group": AdvantageFacts(
        "reward less the mean of its group (arXiv 2402.03300)", ".rl.group_advantages:centred", scaled=True
    ),
    "rloo": AdvantageFacts(
        "reward less the mean of the others in its group (arXiv 2402.14740)", ".rl.group_advantages:leave_one_out"
    ),
    "maxrl": AdvantageFacts(
        "reward less the group's mean, divided by that mean (arXiv 2602.02710)", ".rl.group_advantages:over_the_mean"
    ),
}


@dataclass(frozen=True)
class ScaleFacts:
    """implementation: (advantages (n, G), rewards (n, G)) -> advantages (n, G)."""

    help: str
    implementation: str


SCALES: dict[str, ScaleFacts] = {
    "group": ScaleFacts("divided by the deviation of the group", ".rl.group_advantages:per_group"),
    "batch": ScaleFacts("divided by the deviation of all answers of the rollout", ".rl.group_advantages:per_rollout"),
    "none": ScaleFacts("not divided (Dr. GRPO)", ".rl.group_advantages:unscaled"),
}
