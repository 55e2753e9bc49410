"""Never lose work: resume points while a run goes, one more when it is stopped, and going on from one bit for bit.

A point is taken between two optimizer steps. What it needs beside the tensors is noted after each step (`run_state`),
so a run that is stopped in the middle of a step leaves the point of the step before: the tensors change only in the
optimizer's update, and signals wait for the end of that.
"""

from __future__ import annotations

import logging
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from rwkv_rlhf.checkpoints.loading import checkpoint_tensors, copy_into
from rwkv_rlhf.checkpoints.resume_points import ResumePoint, ResumePoints
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import read_json_object, write_json
from rwkv_rlhf.reports.metrics import METRICS, append_json, drop_after
from rwkv_rlhf.reports.samples import ANSWERED, FIRST, SAMPLES
from rwkv_rlhf.rl.rewards import RewardError
from rwkv_rlhf.training.background import Background
from rwkv_rlhf.training.callbacks import STOPS, Save
from rwkv_rlhf.training.find_point import NEVER
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.out_of_memory import is_out_of_memory
from rwkv_rlhf.training.run_state import run_state, skip_batches, take_run_state
from rwkv_rlhf.training.strategies import load_rank_state, rank_state

log = logging.getLogger(__name__)

LOG = "train_log.txt"
EVENTS = tuple(f'{{"event": "{name}"' for name in ("start", "train", "val", "tasks"))
LOGS = {METRICS: EVENTS, LOG: tuple("0123456789"), SAMPLES: (FIRST, ANSWERED)}  # how lines begin that come again
BEGUN = "begun.json"  # in the resume folder: how long the logs were when the run began
SIGNALS = (None, signal.SIGTERM, signal.SIGINT)  # what may be asked of a rank; the last one wins
PATIENT = 2.0  # seconds in which a signal that comes twice (from a terminal and from a launcher) is one


def take_weights(model: torch.nn.Module, point: ResumePoint, model_hash: str) -> None:
    """Put the trained tensors of `point` into `model`. Raises ValueError for another base model."""
    if point.about["model"] != model_hash:
        raise ValueError(
            f"{point.path} belongs to a run from another base model ({point.about['base']}): {{load_model}}"
        )
    copy_into(checkpoint_tensors(model), point.read(0)["weights"], point.path)


class HostCopy:
    """Copies of a tree's tensors in host memory that is used again and again; pinned for those of a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, tree: Any, name: str = "") -> Any:
        """`tree` with copies of its tensors. They hold until the next call."""
        copied = self._copy(tree, name)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copy(self, tree: Any, name: str) -> Any:
        if isinstance(tree, dict):
            return {key: self._copy(value, f"{name}/{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value, f"{name}/{at}") for at, value in enumerate(tree))
        if not isinstance(tree, Tensor):
            return tree
        held = self._held.get(name)
        if held is None or held.shape != tree.shape or held.dtype != tree.dtype:
            held = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            self._held[name] = held
        return held.copy_(tree.detach(), non_blocking=True)


class WriteResumePoints(pl.Callback):
    """Writes a point at every numbered save and each `every` optimizer steps, in the background; and when stopped.

    `resumed` is the point to go on from; with `again` and none, a run that was killed before its first point is what
    this one repeats, so the lines of that one go. Comes after the callbacks whose state it keeps. Raises ValueError
    on the training thread, at the next step, when a point could not be written.
    """

    def __init__(
        self, points: ResumePoints, save: Save, every: int, folder: Path, resumed: ResumePoint | None, again: bool
    ) -> None:
        self.points, self.save, self.every, self.folder = points, save, every, folder
        self.resumed, self.again = resumed, again
        self.background = Background()
        self.copy = HostCopy()
        self.state: dict[str, Any] = {}  # after the last optimizer step
        self._skip = 0
        self._guards = 0
        self._asked: int | None = None  # the signal that came
        self._since = 0.0
        self._agreed = False  # all ranks stop after the same step
        self._leaving = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from the point, if there is one, and watch out for signals."""
        assert isinstance(pl_module, TrainingModule)
        self.trainer, self.module = trainer, pl_module
        self.points.join(
            trainer.global_rank, trainer.world_size, ranks.broadcast_from_zero(lambda: secrets.token_hex(4))
        )
        pl_module.after_step.append(self.step_done)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._signalled)
            signal.signal(signal.SIGTERM, self._signalled)
        if self.resumed is None:
            if trainer.is_global_zero and self.every != NEVER:
                self._begin()
            self._note()
        else:
            self._go_on(self.resumed)

    def _begin(self) -> None:
        """Note where the logs of this run begin."""
        begun = self.points.folder / BEGUN
        if self.again and begun.exists():
            self._drop_lines(read_json_object(begun))
        write_json(begun, self._log_sizes())

    def _drop_lines(self, sizes: dict[str, int]) -> None:
        for name, beginnings in LOGS.items():
            if name in sizes:  # a point of an older version knows fewer
                drop_after(self.folder / name, sizes[name], beginnings)

    def _go_on(self, point: ResumePoint) -> None:
        found = point.read(self.trainer.global_rank)
        load_rank_state(self.trainer, found["optimizer"])
        state = found["run"]
        if self.trainer.is_global_zero:
            if point.project.resolve() == self.folder.resolve():
                self._drop_lines(state["logs"])
            append_json(self.folder / METRICS, {"event": "resume", "step": state["step"]})
            log.info("resuming from %s: optimizer step %d is done", point.path, state["step"])
            if state["step"] >= self.trainer.max_steps:
                log.info(
                    "the run is finished, nothing is left to do: a larger --epochs or --epoch_count makes it longer, "
                    "and --load_adapter %s in another folder trains on with other settings",
                    self.folder / "rwkv-final.pth",
                )
        self._skip = 0 if state["over"] else state["done"]
        take_run_state(self.trainer, self.module, state)
        if not state["over"]:  # else its end was dealt with just now
            self.state = state | {"logs": self._log_sizes()}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A point in the middle of a mini-epoch: tell Lightning, at the first batch, what came before it."""
        if self._skip:
            skip_batches(trainer, self._skip)
            self._skip = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """From here to `step_done` the tensors change: no signal may come between."""
        self._guards = 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two micro-batches of a step."""
        if not self._guards:
            self._stop_if_asked()

    def step_done(self) -> None:
        """An optimizer step is done and its record is written."""
        self._note()
        if self._due() and not self.state["over"]:  # at the end of a mini-epoch it comes after the saves
            self._write()
        self._guards = 0
        self.background.check()
        self._stop_if_asked()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the saves of a mini-epoch."""
        with self._guarded():
            self._note(ended=True)
            if self.every != NEVER and (self.save.saved or self._due()):
                self._write()
        self._stop_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last point must be whole before the run counts as done."""
        self.background.wait()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stopped or out of memory: what is done stays, unless the tensors were just being changed."""
        self._leaving = True
        stopped = isinstance(exception, STOPS) or is_out_of_memory(exception)
        together = trainer.world_size == 1 or self._agreed or isinstance(exception, RewardError)
        try:
            if stopped and together and self.state and not self._guards and self.every != NEVER:
                self.background.wait()
                self.points.write(self._place(), self._tree())
                log.info("--resume auto will continue after step %d", self.state["step"])
            else:
                self.background.wait()
        except (ValueError, RuntimeError, MemoryError) as error:
            if not isinstance(exception, STOPS):
                log.warning("%s", error)  # the cause is the other one
                return
            raise

    def _note(self, ended: bool = False) -> None:
        self.state = run_state(self.trainer, self.module, ended=ended) | {"logs": self._log_sizes()}

    def _log_sizes(self) -> dict[str, int]:
        return {name: _size(self.folder / name) for name in LOGS}

    def _due(self) -> bool:
        return self.every > 0 and self.state["step"] % self.every == 0

    def _tree(self) -> dict[str, Any]:
        """All that this rank keeps, the tensors as they are. Every rank calls it: some weights are spread over them."""
        tree = {"run": self.state, "optimizer": rank_state(self.trainer)}
        weights = {}
        spread = ranks.is_sharded(self.module.model)
        for name, parameter in checkpoint_tensors(self.module.model).items():
            with ranks.full_tensor(parameter) as tensor:
                if ranks.is_rank_zero():
                    weights[name] = tensor.to("cpu", copy=True) if spread else tensor
        if weights:
            tree["weights"] = weights
        return tree

    def _write(self) -> None:
        """Copy on this thread, write on another."""
        self.background.wait()  # it reads the copy
        copied, place = self.copy(self._tree()), self._place()
        self.background.start(lambda: self.points.write(place, copied))

    def _place(self) -> dict[str, int]:
        return {name: self.state[name] for name in ("step", "epoch", "done")}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self._guards += 1
        try:
            yield
        finally:
            self._guards -= 1

    def _signalled(self, number: int, frame: object) -> None:
        """Ctrl+C or SIGTERM: stop at once, or as soon as nothing is half done and, with several ranks, all of them."""
        if self._leaving:
            return
        again = self._asked is not None and time.monotonic() - self._since > PATIENT
        if self._asked is None:
            self._since = time.monotonic()
        self._asked = number
        if not self._guards and (self.trainer.world_size == 1 or again):
            raise _exception(number)

    def _stop_if_asked(self) -> None:
        number = self._asked
        if ranks.is_distributed():
            asked = SIGNALS.index(None if number is None else signal.Signals(number))
            number = self._asked = SIGNALS[int(ranks.all_reduce_max(asked))]
        if number is not None:
            self._agreed = True
            raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
