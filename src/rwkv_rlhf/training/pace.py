"""How far a run is, how fast it goes, and when it will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

REAL_STEPS = 3  # after which a time is worth saying: the first ones compile and warm up
RECENT = 50  # steps whose speeds and losses count


class Pace:
    """Told of each optimizer step by `step`. total: those of the whole run."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = 0
        self.here = 0  # steps of this start
        self.losses: deque[float] = deque(maxlen=RECENT)
        self._speeds: deque[float] = deque(maxlen=RECENT)
        self._begun = clock()
        self._first = self._begun  # when the first step of this start was done

    def step(self, record: dict[str, Any]) -> None:
        """An optimizer step is done."""
        self.done = record["step"]
        self.here += 1
        self.losses.append(record["loss"])
        if self.here == 1:
            self._first = self.clock()
        else:
            self._speeds.append(record["tokens_per_s"])

    @property
    def seconds(self) -> float:
        """Since this start."""
        return self.clock() - self._begun

    @property
    def tokens_per_s(self) -> float:
        """Median of the last steps, without the first one of this start; 0 before there is any."""
        return median(self._speeds) if self._speeds else 0.0

    @property
    def mean_loss(self) -> float:
        """Of the last steps."""
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this start, validation and saves counted in; None before there is one."""
        if self.here < 2:
            return None
        return (self.clock() - self._first) / (self.here - 1) * max(0, self.total - self.done)
