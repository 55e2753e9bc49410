"""One training run: batches in order, Lightning's loop, saves and logs around it."""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset, Sampler

from rwkv_rlhf.checkpoints.resume_points import ResumePoint, ResumePoints
from rwkv_rlhf.checkpoints.run_folder import RunFolder
from rwkv_rlhf.data.batch import Batch
from rwkv_rlhf.data.policy_batch import PromptBatch
from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.launch import rank_info
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.journal import Journal
from rwkv_rlhf.reports.logger import Logger, open_loggers
from rwkv_rlhf.reports.metrics import log_new_run
from rwkv_rlhf.reports.run_facts import ENDED
from rwkv_rlhf.reports.wandb_run import WandbLog
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.exit_status import Failure
from rwkv_rlhf.training.callbacks import Kept, Log, Loggers, Report, Save, Validate
from rwkv_rlhf.training.fixed_prompts import FixedPrompts
from rwkv_rlhf.training.held_out_lines import Figures
from rwkv_rlhf.training.launch_environment import LaunchEnvironment
from rwkv_rlhf.training.length import micro_batches_per_epoch, optimizer_steps
from rwkv_rlhf.training.module import NonFiniteLoss, TrainingModule
from rwkv_rlhf.training.pace import Pace
from rwkv_rlhf.training.resume import WriteResumePoints
from rwkv_rlhf.training.screen import Bar, Spoken
from rwkv_rlhf.training.strategies import make_strategy
from rwkv_rlhf.training.task_figures import TaskFigures


class MicroBatches(Dataset[Batch | PromptBatch]):
    """Micro-batch k of this rank, counted from the very start of training.

    With `ahead`, for a GPU, a thread reads k + 1 into pinned memory while k is at work. Prompts, whose answers are
    still to be sampled, are not read ahead.
    """

    def __init__(self, steps: Steps | MixedSteps | PromptSteps, ahead: bool = False) -> None:
        self.steps, self.ahead = steps, ahead and not isinstance(steps, PromptSteps)
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Batch | PromptBatch]] = {}

    def __getitem__(self, k: int) -> Batch | PromptBatch:
        if not self.ahead:
            return self.steps.micro_batch(k)
        if self._reader is None:  # pinned memory belongs to the device of the thread that asks for it
            device = torch.cuda.current_device()
            self._reader = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,))
        batch = self._coming.pop(k, None) or self._reader.submit(self._read, k)
        self._coming = {k + 1: self._reader.submit(self._read, k + 1)}
        return batch.result()

    def _read(self, k: int) -> Batch | PromptBatch:
        batch = self.steps.micro_batch(k)
        return batch if isinstance(batch, PromptBatch) else batch.pin_memory()


class EpochPositions(Sampler[int]):
    """Positions of one mini-epoch; Lightning tells which one through `set_epoch`.

    A run that is resumed in mini-epoch `resumed` leaves out the `done` micro-batches that it had.
    """

    def __init__(self, per_epoch: int, first_epoch: int, resumed: int = 0, done: int = 0) -> None:
        self.per_epoch = per_epoch
        self.first_epoch = first_epoch
        self.resumed = resumed
        self.done = done
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over mini-epoch `epoch` of this run."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        begin = (self.first_epoch + self.epoch) * self.per_epoch
        done = self.done if self.epoch == self.resumed else 0
        return iter(range(begin + done, begin + self.per_epoch))


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands around the steps of a run.

    Attributes:
        evaluate: scores what is held out, None without any. wrong: the pairs that it found wrong.
        prompts: answers the fixed prompts, None without any. journal: what the page is made from; rank zero's.
        tasks: measures the evaluation tasks, None without any. pass_steps: optimizer steps of one pass over the data.
    """

    evaluate: Callable[[], dict[str, Any]] | None = None
    wrong: Callable[[], dict[str, Any]] = dict
    prompts: FixedPrompts | None = None
    journal: Journal | None = None
    tasks: Callable[[], Figures] | None = None
    pass_steps: float = 1.0


def _callbacks(
    config: Config, run: RunFolder, settings: dict[str, Any], around: Around, save: Save, pace: Pace, bar: bool
) -> list[pl.Callback]:
    """What logs, scores, saves and shows, in this order: a save writes what validation found. Logs are rank zero's."""
    loggers = Loggers(_loggers(config, run.folder, settings))
    keep, callbacks = Kept(run.folder, loggers), list[pl.Callback]([loggers])
    if ranks.is_rank_zero():
        spoken = None if bar else Spoken(pace)
        callbacks.append(Log(run.folder, config.log_every, config.epoch_begin, pace, spoken))
    if around.evaluate is not None:
        callbacks.append(Validate(around.evaluate, run, config.early_stop, keep, around.journal, around.wrong))
    if around.prompts is not None:
        callbacks.append(around.prompts)
    if around.tasks is not None:
        callbacks.append(TaskFigures(around.tasks, keep))
    callbacks.append(save)
    if bar:
        callbacks.append(Bar(pace, around.pass_steps))
    return callbacks


def _loggers(config: Config, folder: Path, settings: dict[str, Any]) -> list[Logger]:
    """Where else the figures go: of rank zero."""
    if not ranks.is_rank_zero():
        return []
    wandb = [WandbLog(config.wandb, folder, settings)] if config.wandb else []
    return [*wandb, *open_loggers(config.logger, folder)]


def fit(
    module: TrainingModule,
    steps: Steps | MixedSteps | PromptSteps,
    config: Config,
    run: RunFolder,
    settings: dict[str, Any],
    around: Around | None = None,
    points: ResumePoints | None = None,
    resumed: ResumePoint | None = None,
) -> bool:
    """Train to the end, from the point `resumed` on; True when Ctrl+C stopped it (rwkv-last is written then)."""
    folder: Path = run.folder
    around = around or Around()
    # Lightning's advice is about data loaders and loggers that this program does not have
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ranks.is_rank_zero():
        with Harmless("train_log.txt cannot be written")():
            log_new_run(folder / "train_log.txt", settings)
    bar = config.enable_progress_bar and sys.stderr.isatty() and ranks.is_rank_zero()
    pace = Pace(optimizer_steps(config, steps))
    save = Save(run, config.epoch_begin, config.epoch_save)
    callbacks = _callbacks(config, run, settings, around, save, pace, bar)
    if points is not None:
        callbacks.append(WriteResumePoints(points, save, config.resume_every, folder, resumed, config.resume == "auto"))
    report = None if around.journal is None else Report(save, around.journal, pace)
    if report is not None:
        callbacks.append(report)
    device = next(module.parameters()).device
    trainer = pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config, module.model),
        plugins=LaunchEnvironment(rank_info()),
        max_epochs=config.epoch_count,
        max_steps=pace.total,
        accumulate_grad_batches=config.accumulate_grad_batches,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    begin = (resumed.about["epoch"], resumed.about["done"]) if resumed else (0, 0)
    positions = EpochPositions(micro_batches_per_epoch(config), config.epoch_begin, *begin)
    # a generator of its own: each pass over a loader draws a number, and a resumed run makes one pass more
    batches = MicroBatches(steps, ahead=device.type == "cuda")
    loader = DataLoader(batches, batch_size=None, sampler=positions, generator=torch.Generator())
    try:
        trainer.fit(module, loader)
    except SIGTERMException as stop:  # a SystemExit without a status; rwkv-last is written
        more = "" if config.resume_every < 0 else ", --resume auto goes on"
        raise Failure(f"stopped by SIGTERM; rwkv-last holds what was learnt{more}") from stop
    except SystemExit:  # Lightning turns Ctrl+C into exit(1) after the callbacks have saved
        if not save.stopped:
            raise
    if not save.stopped:
        if trainer.global_step and not module.good_steps:
            raise NonFiniteLoss(
                f"all {trainer.global_step} optimizer steps were left out, so nothing was learnt and nothing is saved: "
                "use --precision fp32, or look for odd rows in the data"
            )
        run.save("final")
        if report is not None:
            report.journal.facts.state = ENDED
            report.draw()
    return save.stopped
