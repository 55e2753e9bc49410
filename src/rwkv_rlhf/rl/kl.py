"""The weight of the KL penalty in rewards, and when a policy has moved too far.

Ziegler et al., "Fine-tuning language models from human preferences" (arXiv 1909.08593, section 2.2): the weight grows
when the measured divergence is above its target and shrinks when it is below, in proportion, but slowly. The estimates
of the divergence itself are in `losses/kl.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

STEEPEST = 0.2  # largest relative error that the weight answers to
PATIENCE = 1.5  # multiples of the target divergence of one update at which its passes end


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The next weight: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon).

    kl: mean divergence of a whole answer from the reference, nats. samples: answers since the last change.
    """
    error = min(max(kl / target - 1, -STEEPEST), STEEPEST)
    return coef * (1 + error * samples / horizon)


@dataclass
class KLController:
    """The weight of the penalty, `coef`; with `adaptive` False it stays what it is."""

    coef: float
    target: float = 6.0
    horizon: int = 10000
    adaptive: bool = True

    def update(self, kl: float, samples: int) -> None:
        """Take note of the mean divergence `kl` (nats an answer) of `samples` answers."""
        if self.adaptive:
            self.coef = adapted_kl_coef(self.coef, kl, self.target, samples, self.horizon)


def moved_too_far(kl: float, target: float) -> bool:
    """Whether the passes over a rollout should end: its policy is more than 1.5 targets from the one that sampled it.

    kl: mean over tokens of log-probability then - now, nats.
    """
    return kl > PATIENCE * target
