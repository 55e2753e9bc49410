"""What happens around the steps: records, validation, saves, the page, and a save when the run is stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_rlhf.checkpoints.run_folder import RunFolder
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.journal import Journal
from rwkv_rlhf.reports.logger import TRAINING, Logger
from rwkv_rlhf.reports.metrics import METRICS as METRICS_FILE
from rwkv_rlhf.reports.metrics import append_json, log_epoch
from rwkv_rlhf.reports.run_facts import STOPPED
from rwkv_rlhf.rl.rewards import RewardError
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.training.ending import saved_files
from rwkv_rlhf.training.held_out_lines import deciding, held_out_line
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.pace import Pace
from rwkv_rlhf.training.run_state import left_alone
from rwkv_rlhf.training.screen import Spoken, say_pace

log = logging.getLogger(__name__)

Evaluate = Callable[[], dict[str, Any]]
STOPS = (KeyboardInterrupt, SIGTERMException, RewardError)  # after which the weights are good, and are saved


def training(module: pl.LightningModule) -> TrainingModule:
    """The module as these callbacks know it."""
    assert isinstance(module, TrainingModule)
    return module


class Log(pl.Callback):
    """Appends metrics.jsonl per optimizer step and train_log.txt per mini-epoch, and tells `pace` of each step.

    With `spoken` (no progress bar to look at) it also says a line every few seconds.
    """

    def __init__(self, folder: Path, every: int, epoch_begin: int, pace: Pace, spoken: Spoken | None) -> None:
        self.pace, self.spoken = pace, spoken
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
        self.pace.step(record)
        if self.spoken is not None:
            self.spoken(record)
        say_pace(self.pace)

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
    """Scores the held-out examples before training and after each mini-epoch, and keeps the best as rwkv-best.

    With `patience` > 0 the run ends after so many mini-epochs without improvement. `keep` is given each record.
    `journal`: where the page learns of it (rank zero), `wrong`: the pairs that the last score found wrong.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        folder: RunFolder,
        patience: int,
        keep: Callable[[dict[str, Any]], None],
        journal: Journal | None = None,
        wrong: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.patience = patience
        self.waited = 0
        self.evaluate, self.keep = evaluate, keep
        self.folder = folder
        self.journal, self.wrong = journal, wrong
        self.best: tuple[float, ...] | None = None
        self.before: dict[str, Any] | None = None  # the figures before training

    def state_dict(self) -> dict[str, Any]:
        """The best so far, how many mini-epochs were not better, and where it began."""
        return {"best": self.best, "waited": self.waited, "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing; a run that was not validated before has nothing to compare with."""
        self.best, self.waited = state_dict.get("best"), state_dict.get("waited", 0)
        self.before = state_dict.get("before")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the model before step 1: what comes later is a change."""
        if self.before is not None or trainer.global_step:
            return
        with left_alone(trainer.strategy.root_device):
            self.before = self.evaluate()
        self._keep({"event": "start", "step": 0} | self.before)
        log.info("%s (before training)", held_out_line(self.before, None))

    def _keep(self, record: dict[str, Any]) -> None:
        self.keep(record)
        if self.journal is not None and (wrong := self.wrong()):
            self.journal.facts.wrong = wrong | {"step": record["step"]}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score, and save what is better than all before."""
        record = {"event": "val", "step": trainer.global_step} | self.evaluate()
        self._keep(record)
        log.info("%s", held_out_line(record, self.before))
        found = merit(record)
        if not all(map(math.isfinite, found)) or not training(pl_module).good_steps:
            log.warning("rwkv-best is not written: the held-out figures are no numbers, or nothing was learnt yet")
        elif self.best is None or found > self.best:
            self.best, self.waited = found, 0
            name, value = deciding(record)
            if self.journal is not None:
                self.journal.facts.held_out = {"name": name, "value": value, "step": trainer.global_step}
            self.folder.save("best", f"held-out {name} {value:.3f}, step {trainer.global_step}")
            return
        self.waited += 1
        if self.waited == self.patience:
            log.info("stopping: no improvement for %s (--early_stop)", counted(self.patience, "mini-epoch"))
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
    """Redraws the page each minute and after each save; comes after the resume points, as nothing depends on it."""

    def __init__(self, save: Save, journal: Journal, pace: Pace) -> None:
        self.save, self.journal, self.pace = save, journal, pace
        self._before = journal.facts.seconds  # of earlier starts

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the module's records."""
        training(pl_module).listeners.append(self.record)

    def record(self, record: dict[str, Any]) -> None:
        """One optimizer step is done."""
        self._take_pace()
        self.journal.step = record["step"]
        self.journal.tick()

    def _take_pace(self) -> None:
        self.journal.facts.seconds = self._before + self.pace.seconds
        self.journal.facts.tokens_per_s = self.pace.tokens_per_s

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When the mini-epoch was saved."""
        if self.save.saved:
            self.draw()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """When rwkv-last was saved, and when the run broke."""
        self.journal.facts.state = STOPPED
        self.draw()

    def draw(self) -> None:
        """Redraw page and picture; only rank zero's is called."""
        self._take_pace()
        with self.journal.harmless():
            self.journal.facts.files = saved_files(self.save.folder.folder)
        self.journal.write(picture=True)


class Loggers(pl.Callback):
    """Tells other places of every record, each optimizer step's before it is logged here; one that fails is left."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = [(logger, Harmless(f"{logger.name} lacks records")) for logger in loggers]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to the module's records."""
        training(pl_module).listeners.append(lambda record: self.tell({"event": TRAINING} | record))

    def tell(self, record: dict[str, Any]) -> None:
        """One more record."""
        for logger, harmless in self.loggers:
            with harmless():
                logger.add(record)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close them."""
        for logger, harmless in self.loggers:
            with harmless():
                logger.close()


class Kept:
    """Rank zero's records of held-out examples and of tasks: to the loggers, then into metrics.jsonl."""

    def __init__(self, folder: Path, loggers: Loggers) -> None:
        self.path, self.loggers = folder / METRICS_FILE, loggers
        self.harmless = Harmless(f"{METRICS_FILE} lacks held-out figures")

    def __call__(self, record: dict[str, Any]) -> None:
        """One more record; nothing on the other ranks."""
        if ranks.is_rank_zero():
            self.loggers.tell(record)
            with self.harmless():
                append_json(self.path, record)
