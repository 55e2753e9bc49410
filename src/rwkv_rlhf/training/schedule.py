"""Learning rate by optimizer step (warm-up from one fifth, then exponential, cosine, linear or constant), and decay.

The kind `rwkv-lm` is the schedule of RWKV-LM's RWKV-v7/train_temp/src/trainer.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_rlhf.settings.config import RWKV_LM


@dataclass(frozen=True)
class Schedule:
    """Counts optimizer steps `s` from 0. `total` is the length of the whole run, `offset` what earlier runs took."""

    warmup: int
    total: int
    kind: str = "exp"
    offset: int = 0

    def progress(self, step: int) -> float:
        """How far optimizer step `step` (0 is the first one of this run) is: p = (s-w)/(total-w) in [0, 1], w the
        steps of warm-up."""
        warmup = max(0, self.warmup)
        horizon = max(1, self.total - warmup)
        return min(1.0, max(0.0, (step + self.offset - warmup) / horizon))

    def rate(self, step: int, initial: float, final: float) -> float:
        """The learning rate of optimizer step `step`.

        lr = initial * (0.2 + 0.8 s/w) while s < w, else initial * (final/initial)^p with p = `progress`; an end at 0
        makes the exponential a straight line. As RWKV-LM has it, a warm-up goes from 1 % and begins anew in each run:
        cosine(p) * (0.01 + 0.99 t/w) while t < w, t the steps of this run.
        """
        if self.kind == RWKV_LM:
            warm = 0.01 + 0.99 * step / self.warmup if step < self.warmup else 1.0
            return self._cosine(step, initial, final) * warm
        s = step + self.offset
        if s < self.warmup:
            return initial * (0.2 + 0.8 * s / self.warmup)
        progress = self.progress(step)
        if self.kind == "constant":
            return initial
        if self.kind == "cosine":
            return self._cosine(step, initial, final)
        if self.kind == "linear":
            return initial + (final - initial) * progress
        return exponential(initial, final, progress)

    def _cosine(self, step: int, initial: float, final: float) -> float:
        return final + (initial - final) * 0.5 * (1 + math.cos(math.pi * self.progress(step)))

    def decay(self, step: int, initial: float, final: float) -> float:
        """The weight decay of optimizer step `step`, as RWKV-LM has it: initial * (final/initial)^p, whatever the
        learning rate does. `initial` 0 stays 0; `final` below 0 changes nothing."""
        return initial if initial == 0 or final < 0 else exponential(initial, final, self.progress(step))


def exponential(initial: float, final: float, progress: float) -> float:
    """initial * (final/initial)^progress, or a straight line where an end is 0."""
    if initial <= 0 or final <= 0:
        return initial + (final - initial) * progress
    return initial * math.pow(final / initial, progress)
