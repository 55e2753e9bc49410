"""What scores say, in sentences. Here is no Lightning: --eval_only says it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rwkv_rlhf.reports.words import change, figure
from rwkv_rlhf.settings.metrics import METRICS

Figures = dict[str, float]


def deciding(record: dict[str, Any]) -> tuple[str, float]:
    """The figure by which a person knows what `merit` compares: its name, its value."""
    name = next((name for name in ("accuracy", "reward") if name in record), "loss")
    return name, record[name]


def held_out_line(record: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The figures that have a curve, the deciding one first, each with what it was before training if known."""
    drawn = [name for name, metric in METRICS.items() if metric.panel and isinstance(record.get(name), float)]
    first, _ = deciding(record)
    if first == "reward":  # of answers that were sampled: there the loss is the same number, turned round
        drawn.remove("loss")
    drawn.sort(key=lambda name: name != first)
    was = before or {}

    def shown(name: str) -> str:
        return change(was[name], record[name]) if isinstance(was.get(name), float) else figure(record[name])

    return "held out: " + ", ".join(f"{name} {shown(name)}" for name in drawn)


def tasks_lines(figures: Figures, before: Figures | None = None) -> Iterator[str]:
    """A line for each task, each figure with what it was before if known."""
    by_task: dict[str, list[str]] = {}
    for name, value in figures.items():
        task, _, what = name.rpartition("/")
        was = (before or {}).get(name)
        shown = figure(value) if was is None or was == value else change(was, value)
        by_task.setdefault(task, []).append(f"{what} {shown}")
    yield from (f"{task}: {', '.join(found)}" for task, found in by_task.items())
