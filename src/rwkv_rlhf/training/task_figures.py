"""--eval_tasks while training: the tasks before step 1 and after the last one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.training.held_out_lines import Figures, tasks_lines
from rwkv_rlhf.training.run_state import left_alone

log = logging.getLogger(__name__)

EVENT = "tasks"


class TaskFigures(pl.Callback):
    """Measures on every rank, as the model may be spread over them; `tell` is called with each record.

    What cannot be measured ends a run before its first step, and after the last one costs it nothing.
    """

    def __init__(self, measure: Callable[[], Figures], tell: Callable[[dict[str, Any]], None]) -> None:
        self.measure, self.tell = measure, tell
        self.before: Figures | None = None
        self.harmless = Harmless("the evaluation tasks are not measured")

    def state_dict(self) -> dict[str, Any]:
        """The figures before training."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with them."""
        self.before = state_dict.get("before")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before step 1."""
        if self.before is None and not trainer.global_step:
            self.before = self._measured(trainer)
            for line in tasks_lines(self.before):
                log.info("%s (before training)", line)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step; not when the run was stopped."""
        if trainer.interrupted:
            return
        with self.harmless():
            for line in tasks_lines(self._measured(trainer), self.before):
                log.info("%s", line)

    def _measured(self, trainer: pl.Trainer) -> Figures:
        with left_alone(trainer.strategy.root_device):
            found = self.measure()
        self.tell({"event": EVENT, "step": trainer.global_step, "tasks": found})
        return found
