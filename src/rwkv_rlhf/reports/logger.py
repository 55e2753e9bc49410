"""Where else the figures of a run go: what every such place is told, under the names of `settings/metrics.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.loggers import loggers

TRAINING = "train"  # the event of a step; other records are of held-out data and of evaluation tasks
ABOUT = ("event", "step")


class Logger(Protocol):
    """Is told of every record of a run in the order of its steps, before that stands in metrics.jsonl.

    A run that goes on after a stop begins at an earlier step than the last one told. name: what people call the place.
    """

    name: str

    def add(self, record: dict[str, Any]) -> None:
        """One more record, with its event and its step."""

    def close(self) -> None:
        """The run is over."""


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record by name, those of evaluation tasks as TASK/FIGURE."""
    flat = record | record.get("tasks", {})
    return {name: value for name, value in flat.items() if name not in ABOUT and isinstance(value, int | float)}


def open_loggers(spec: str, folder: Path) -> list[Logger]:
    """Those that --logger names, for the run in `folder`. Raises ValueError as `loggers`."""
    return [load(facts.implementation)(folder) for facts in loggers(spec).values()]
