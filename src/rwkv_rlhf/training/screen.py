"""What a person watches while a model trains: one bar for the whole run, or without a terminal a line now and then."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rwkv_rlhf.data.progress import logging_to_stderr_of_now
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.words import duration, short_count
from rwkv_rlhf.settings.metrics import METRICS
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.pace import REAL_STEPS, Pace

log = logging.getLogger(__name__)

BAR = 24  # columns of the bar itself, at most
LEAST_BAR = 8
DOT = "\u00b7"


def shown(record: dict[str, Any]) -> dict[str, str]:
    """The numbers that a person watches, by their short names: what the table of metrics has one for."""
    watched = ((metric.short, record[name]) for name, metric in METRICS.items() if metric.short and name in record)
    return {short: f"{value:.4g}" for short, value in watched}


def place(pace: Pace) -> str:
    """step 33/450 (7%), 6 min left"""
    left = pace.seconds_left
    done = f"step {pace.done}/{pace.total} ({pace.done / max(1, pace.total):.0%})"
    return done if left is None else f"{done}, {duration(left)} left"


def parts(record: dict[str, Any], pace: Pace, pass_steps: float) -> list[tuple[int, str]]:
    """What may stand in the bar, in this order, each with its weight: the lightest is left out first."""
    left = pace.seconds_left
    found = [(9, f"step {pace.done}/{pace.total}"), (4, f"pass {pace.done / pass_steps:.1f}")]
    found.append((8, f"loss {record['loss']:.2f}"))
    if pace.here > 1:
        found.append((3, f"mean {pace.mean_loss:.2f}"))
    if "accuracy" in record:
        found.append((6, f"acc {record['accuracy']:.2f}"))
    if "reward" in record:
        found.append((6, f"reward {record['reward']:.3g}"))
    found += [(5, f"lr {record['lr']:.1e}"), (1, f"grad {record['grad_norm']:.2g}")]
    if pace.tokens_per_s:
        found.append((2, f"{short_count(pace.tokens_per_s)} tok/s"))
    if "memory" in record:
        found.append((0, f"{record['memory']:.1f} GiB"))
    if left is not None:
        found.append((7, f"{duration(left)} left"))
    return found


def fitted(found: list[tuple[int, str]], width: int, dot: str = DOT) -> str:
    """The parts in one line of at most `width` columns."""
    kept = list(found)
    while len(kept) > 1 and len(f" {dot} ".join(text for _, text in kept)) > width:
        kept.remove(min(kept))
    return f" {dot} ".join(text for _, text in kept)[:width]


class Bar(pl.Callback):
    """One line at the bottom of the terminal, with log lines above it. A terminal that is gone does not end the run."""

    def __init__(self, pace: Pace, pass_steps: float, console: Console | None = None) -> None:
        self.pace, self.pass_steps = pace, max(1.0, pass_steps)
        self.console = console or Console(stderr=True)
        self.harmless = Harmless("the progress bar cannot be shown")
        self.live: Live | None = None
        self.open = ExitStack()  # what is given back at the end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the module's records."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.listeners.append(self.record)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on log lines stand above the bar."""
        with self.harmless():
            self.open.enter_context(live := Live(console=self.console, refresh_per_second=4, transient=True))
            self.open.enter_context(logging_to_stderr_of_now())
            self.live = live

    def record(self, record: dict[str, Any]) -> None:
        """One optimizer step is done; comes after the pace was told."""
        with self.harmless():
            if self.live is not None:
                self.live.update(self.line(record))

    def line(self, record: dict[str, Any]) -> Table:
        """The bar and the numbers behind it, as wide as the terminal at most."""
        width = self.console.width - 1
        room = max(LEAST_BAR, min(BAR, width // 6))
        dot = DOT if "utf" in (self.console.encoding or "").lower() else "|"
        text = fitted(parts(record, self.pace, self.pass_steps), width - room - 1, dot)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(ProgressBar(max(1, self.pace.total), self.pace.done, width=room), Text(text, no_wrap=True))
        return row

    def stop(self) -> None:
        """Give the terminal back."""
        with self.harmless():
            self.live = None
            self.open.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run is over."""
        self.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Or it was stopped."""
        self.stop()


class Spoken:
    """Without a terminal: the first step, the last one, and one every few seconds between."""

    PAUSE = 10.0  # seconds between two lines

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._said = 0.0
        self._last = 0

    def __call__(self, record: dict[str, Any]) -> None:
        """One optimizer step is done; comes after the pace was told."""
        now, last = time.monotonic(), record["step"] >= self.pace.total
        if last or not self._last or now - self._said >= self.PAUSE:
            self.say(record)

    def say(self, record: dict[str, Any]) -> None:
        """A line, unless it was said."""
        if record.get("step", 0) == self._last:
            return
        self._said, self._last = time.monotonic(), record["step"]
        numbers = ", ".join(f"{name} {value}" for name, value in shown(record).items())
        log.info("%s: %s", place(self.pace), numbers)


def say_pace(pace: Pace) -> None:
    """After a few real steps: how long the rest will take."""
    left = pace.seconds_left
    if pace.here == REAL_STEPS and left is not None:
        rest = pace.total - pace.done
        if rest > 1:
            each = left / rest
            log.info("the other %s steps take about %s (%.3g s each)", f"{rest:,}", duration(left), each)
