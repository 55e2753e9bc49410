"""What happens around the steps: records, progress bar, validation, saves, and a save when the run is stopped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_rlhf.checkpoints.run_folder import RunFolder
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.metrics import append_json, log_epoch
from rwkv_rlhf.reports.page import write_report
from rwkv_rlhf.reports.wandb_run import open_wandb
from rwkv_rlhf.rl.rewards import RewardError
from rwkv_rlhf.settings.metrics import METRICS
from rwkv_rlhf.training.module import TrainingModule

log = logging.getLogger(__name__)

Evaluate = Callable[[], dict[str, Any]]
STOPS = (KeyboardInterrupt, SIGTERMException, RewardError)  # after which the weights are good, and are saved


def shown(record: dict[str, Any]) -> dict[str, str]:
    """The numbers that a person watches, by their short names: what the table of metrics has one for."""
    watched = ((metric.short, record[name]) for name, metric in METRICS.items() if metric.short and name in record)
    return {short: f"{value:.4g}" for short, value in watched}


def training(module: pl.LightningModule) -> TrainingModule:
    """The module as these callbacks know it."""
    assert isinstance(module, TrainingModule)
    return module


class Bar(TQDMProgressBar):
    """Lightning's bar with the numbers of the last optimizer step; a terminal that is gone does not end the run."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.harmless = Harmless("the progress bar cannot be shown")

    def on_train_epoch_start(self, *args: Any, **named: Any) -> None:
        """As Lightning's."""
        with self.harmless():
            super().on_train_epoch_start(*args, **named)

    def on_train_batch_end(self, *args: Any, **named: Any) -> None:
        """As Lightning's."""
        with self.harmless():
            super().on_train_batch_end(*args, **named)

    def on_train_epoch_end(self, *args: Any, **named: Any) -> None:
        """As Lightning's."""
        with self.harmless():
            super().on_train_epoch_end(*args, **named)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands to the right of the bar."""
        return dict(shown(training(pl_module).last_record))


class Log(pl.Callback):
    """Appends metrics.jsonl per optimizer step and train_log.txt per mini-epoch.

    With `spoken` (no progress bar to look at) it also says a line every few seconds.
    """

    PAUSE = 10.0  # seconds between two lines

    def __init__(self, folder: Path, every: int, epoch_begin: int, spoken: bool) -> None:
        self.spoken = spoken
        self._said = 0.0
        self.metrics = folder / "metrics.jsonl"
        self.text = folder / "train_log.txt"
        self.every = every
        self.epoch_begin = epoch_begin
        self.harmless = Harmless(f"{self.metrics} or {self.text.name} lacks lines")
        self._losses: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the module's records."""
        training(pl_module).listeners.append(self.record)

    def state_dict(self) -> dict[str, Any]:
        """The losses of the running mini-epoch."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._losses = state_dict["losses"]

    def record(self, record: dict[str, Any]) -> None:
        """One optimizer step is done."""
        self._losses.append(record["loss"])
        if record["step"] % self.every == 0:
            with self.harmless():
                append_json(self.metrics, {"event": "train"} | record)
        if self.spoken and time.monotonic() - self._said >= self.PAUSE:
            self._said = time.monotonic()
            numbers = ", ".join(f"{name} {value}" for name, value in shown(record).items())
            log.info("step %d: %s", record["step"], numbers)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the mini-epoch with its mean loss."""
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            rate = training(pl_module).last_record["lr"]
            with self.harmless():
                log_epoch(self.text, self.epoch_begin + trainer.current_epoch, mean, rate)
        self._losses.clear()


def merit(record: dict[str, Any]) -> tuple[float, ...]:
    """Held-out figures as something to compare: lower loss is better (of sampled answers that is a higher reward); of
    preferences higher accuracy, then margin."""
    if "accuracy" not in record:
        return (-record["loss"],)
    return (record["accuracy"], record.get("reward_margin", record.get("logp_margin", 0.0)))


class Validate(pl.Callback):
    """Scores the held-out examples after each mini-epoch and keeps the best checkpoint as rwkv-best.

    With `patience` > 0 the run ends after so many mini-epochs without improvement.
    """

    def __init__(self, evaluate: Evaluate, folder: RunFolder, patience: int) -> None:
        self.patience = patience
        self.waited = 0
        self.evaluate = evaluate
        self.folder = folder
        self.best: tuple[float, ...] | None = None
        self.harmless = Harmless("metrics.jsonl lacks held-out figures")

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how many mini-epochs were not better."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing; a run that was not validated before has nothing to compare with."""
        self.best, self.waited = state_dict.get("best"), state_dict.get("waited", 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score, and save what is better than all before."""
        record = {"event": "val", "step": trainer.global_step} | self.evaluate()
        if ranks.is_rank_zero():
            with self.harmless():
                append_json(self.folder.folder / "metrics.jsonl", record)
        log.info("held out: %s", ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)))
        found = merit(record)
        if not all(map(math.isfinite, found)) or not training(pl_module).good_steps:
            log.warning("rwkv-best is not written: the held-out figures are no numbers, or nothing was learnt yet")
        elif self.best is None or found > self.best:
            self.best, self.waited = found, 0
            self.folder.save("best")
            return
        self.waited += 1
        if self.waited == self.patience:
            log.info("stopping: no improvement for --early_stop %d mini-epochs", self.patience)
            trainer.should_stop = True


class Save(pl.Callback):
    """Numbered checkpoints every --epoch_save mini-epochs, the last one always, rwkv-last when stopped."""

    def __init__(self, folder: RunFolder, epoch_begin: int, epoch_save: int) -> None:
        self.folder = folder
        self.epoch_begin = epoch_begin
        self.epoch_save = epoch_save
        self.stopped = False
        self.saved = False  # at the end of the last mini-epoch

    def state_dict(self) -> dict[str, Any]:
        """The numbered checkpoints that --keep counts."""
        return {"numbered": self.folder.numbered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting them."""
        self.folder.numbered = state_dict["numbered"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save when the mini-epoch's turn has come."""
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop or trainer.global_step >= trainer.max_steps
        self.saved = (last or epoch % self.epoch_save == 0) and training(pl_module).good_steps > 0
        if self.saved:
            self.folder.save_numbered(self.epoch_begin + epoch)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl+C, SIGTERM or a reward that cannot be used: what was learned so far goes to rwkv-last."""
        if isinstance(exception, STOPS):
            self.stopped = isinstance(exception, KeyboardInterrupt)
            self.folder.save("last")


class Report(pl.Callback):
    """Redraws curves and page after each save; comes after the resume points, as nothing depends on it."""

    def __init__(self, save: Save, settings: dict[str, Any]) -> None:
        self.save = save
        self.settings = settings
        self.harmless = Harmless("report.html is not written")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When the mini-epoch was saved."""
        if self.save.saved:
            self.draw()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """When rwkv-last was saved."""
        if isinstance(exception, STOPS):
            self.draw()

    def draw(self) -> None:
        """Redraw; only rank zero's is called."""
        with self.harmless():
            write_report(self.save.folder.folder, self.settings)


class WandB(pl.Callback):
    """Sends the record of each optimizer step to Weights & Biases: only then does anything leave the machine."""

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        self.run = open_wandb(project, folder, settings)
        self.harmless = Harmless("Weights & Biases lacks records")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the module's records."""
        training(pl_module).listeners.append(self.record)

    def record(self, record: dict[str, Any]) -> None:
        """One optimizer step is done."""
        with self.harmless():
            self.run.log(record, step=record["step"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the run there too."""
        with self.harmless():
            self.run.finish()
