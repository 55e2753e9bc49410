"""metrics.jsonl as columns of numbers, read on from where the last reading ended: a page is drawn again each minute."""

from __future__ import annotations

import json
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NOT_DRAWN = ("event", "step")
WINDOWS = 10  # a smoothed line is a mean over a tenth of what there is,
LONGEST_WINDOW = 200  # and over so many steps at most
RAW_POINTS, SMOOTH_POINTS = 600, 300  # of a line on a page


class Line(NamedTuple):
    """Points of a curve: optimizer steps, values."""

    steps: np.ndarray
    values: np.ndarray


class Column:
    """One metric over the optimizer steps."""

    def __init__(self) -> None:
        self._steps, self._values = array("q"), array("d")

    def append(self, step: int, value: float) -> None:
        """One more point."""
        self._steps.append(step)
        self._values.append(value)

    def line(self) -> Line:
        """All points."""
        return Line(np.array(self._steps, dtype=np.int64), np.array(self._values))


class Records:
    """The last run of a folder: `begin` is its first record, `events` those that are no steps (resume), `tasks` the
    figures of evaluation tasks by step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0
        self._forget()

    def _forget(self) -> None:
        self.train: dict[str, Column] = {}
        self.held_out: dict[str, Column] = {}
        self.events: list[dict[str, Any]] = []
        self.begin: dict[str, Any] = {}
        self.tasks: dict[int, dict[str, float]] = {}
        self.step = 0

    @property
    def run(self) -> str:
        """Its id, "" of a run of an older program."""
        return str(self.begin.get("run", ""))

    def read(self) -> None:
        """Take what was added; from the beginning when the file is another one. Unfinished lines come later."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            about = file.seek(0, 2), self.path.stat().st_ino
            if about[1] != self._inode or about[0] < self._offset:
                self._inode, self._offset = about[1], 0
                self._forget()
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if isinstance(record, dict):
                self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        event, step = record.get("event"), record.get("step")
        if event == "begin":
            self._forget()
            self.begin = record
        elif event == "resume":
            self.events.append(record)
        elif event == "tasks" and isinstance(step, int) and isinstance(record.get("tasks"), dict):
            found = record["tasks"].items()
            self.tasks[step] = {name: value for name, value in found if isinstance(value, int | float)}
        elif event in ("train", "val", "start") and isinstance(step, int):
            self.step = max(self.step, step)
            columns = self.train if event == "train" else self.held_out
            for name, value in record.items():
                if name not in NOT_DRAWN and isinstance(value, int | float):
                    columns.setdefault(name, Column()).append(step, value)


def window_of(count: int) -> int:
    """Over how many points of `count` a smoothed line takes its means."""
    return max(1, min(LONGEST_WINDOW, count // WINDOWS))


def smoothed(line: Line) -> Line:
    """Means over neighbouring points, the point itself in the middle; at the ends over those that are there."""
    count = len(line.values)
    half = window_of(count) // 2
    sums = np.concatenate([[0.0], np.cumsum(line.values)])
    first = np.maximum(np.arange(count) - half, 0)
    end = np.minimum(np.arange(count) + half + 1, count)
    return Line(line.steps, (sums[end] - sums[first]) / np.maximum(1, end - first))


def ends(line: Line) -> tuple[float, float] | None:
    """The means of the first and of the last points of a line, as many as `window_of` says; None without points."""
    if not len(line.values):
        return None
    window = window_of(len(line.values))
    return float(line.values[:window].mean()), float(line.values[-window:].mean())


def thinned(line: Line, points: int) -> Line:
    """At most about `points` points: of each stretch its smallest and its largest value, so that no peak is lost."""
    count = len(line.values)
    if count <= points:
        return line
    borders = np.linspace(0, count, points // 2 + 1).astype(int)
    kept = {0, count - 1}
    for begin, end in pairwise(borders):
        kept |= {begin + int(line.values[begin:end].argmin()), begin + int(line.values[begin:end].argmax())}
    chosen = np.array(sorted(kept))
    return Line(line.steps[chosen], line.values[chosen])
