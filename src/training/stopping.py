"""Ctrl+C and SIGTERM with several processes: all of them stop before the same optimizer step, so that a save is whole.

A signal comes to one rank or to all, each at another moment. It is only noted; before each optimizer step the ranks
tell each other what came, and then all stop in the same way. A second signal ends a process at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException

from src.training import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(pl.Callback):
    """Turns the first signal into an orderly end of all ranks."""

    def __init__(self) -> None:
        self.came = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, whose own handler talks to the other ranks in the middle of a step."""
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = max(self.came, number)
        for asked in SIGNALS:
            signal.signal(asked, signal.default_int_handler if asked == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Before an optimizer step: stop if a signal came to any rank."""
        if index % trainer.accumulate_grad_batches:
            return
        came = ranks.largest(self.came)
        if came:
            self._restore()
            raise SIGTERMException if came == signal.SIGTERM else KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
