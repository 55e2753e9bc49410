"""The factor on the loss that keeps half-precision gradients above zero (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = 2.0**16
STEPS = 2000  # without an overflow, after which the scale is doubled
LEAST = 2.0**-13  # below it nothing is left to gain: the gradient itself is no number


class LossScale:
    """The scale and its history; the rule is that of torch.amp.GradScaler, whose defaults these are.

    GradScaler asks each device and rank by itself whether a gradient overflowed; here the norm over all ranks, which a
    step needs anyway, has told it already.
    """

    def __init__(self) -> None:
        self.scale = FIRST
        self.good = 0  # steps since the last change
        self.overflows = 0  # steps that were left out, in all

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients of the scaled loss by the scale, in place; the scale is a power of two, so exactly."""
        if gradients:  # a micro-batch whose loss is no number leaves none
            torch._foreach_mul_(list(gradients), 1 / self.scale)

    def took_step(self) -> None:
        """The gradient was a number: after enough of these the scale is doubled."""
        self.good += 1
        if self.good == STEPS:
            self.scale *= 2
            self.good = 0

    def overflowed(self) -> bool:
        """The gradient was none, and its step is left out: the scale is halved. False when it is too small by now."""
        self.scale /= 2
        self.good = 0
        self.overflows += 1
        return self.scale >= LEAST

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"scale": self.scale, "good": self.good, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.scale, self.good, self.overflows = state["scale"], int(state["good"]), int(state["overflows"])
