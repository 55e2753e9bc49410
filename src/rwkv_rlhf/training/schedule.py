"""Learning rate by optimizer step: warm-up from one fifth, then exponential, cosine, linear or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Counts optimizer steps `s` from 0. `total` is the length of the whole run, `offset` what earlier runs took."""

    warmup: int
    total: int
    kind: str = "exp"
    offset: int = 0

    def rate(self, step: int, initial: float, final: float) -> float:
        """The learning rate of optimizer step `step` (0 is the first one of this run).

        lr = initial * (0.2 + 0.8 s/w) while s < w, else initial * (final/initial)^p with p = (s-w)/(total-w) in
        [0, 1]; an end at 0 makes the exponential a straight line.
        """
        s = step + self.offset
        warmup = max(0, self.warmup)
        if s < warmup:
            return initial * (0.2 + 0.8 * s / warmup)
        horizon = max(1, self.total - warmup)
        progress = min(1.0, max(0.0, (s - warmup) / horizon))
        if self.kind == "constant":
            return initial
        if self.kind == "cosine":
            return final + (initial - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "linear" or initial <= 0 or final <= 0:
            return initial + (final - initial) * progress
        return initial * math.pow(final / initial, progress)
