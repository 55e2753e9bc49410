"""What of a running training is not in its weights: random numbers, position, counters, the optimizer's moments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from rwkv_rlhf.ops.random_state import RandomState
from rwkv_rlhf.training.module import TrainingModule


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training on `device` draws from: Python's, numpy's and PyTorch's."""
    state_of_numpy: Any = np.random.get_state()  # a tuple unless asked otherwise
    kind, keys, at, gauss, cached = state_of_numpy
    drawn = RandomState.now(device)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), at, gauss, cached),
        "torch": drawn.host,
    }
    return state if drawn.cuda is None else state | {"cuda": drawn.cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    RandomState(state["torch"], state.get("cuda") if device.type == "cuda" else None, device).restore()


@contextmanager
def left_alone(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, training goes on drawing as if it had not been."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of a trainer, in the order in which they are called."""
    return list(getattr(trainer, "callbacks"))  # noqa: B009  # set by Lightning's connector, unknown to its types


def run_state(trainer: pl.Trainer, module: TrainingModule, *, ended: bool) -> dict[str, Any]:
    """Position, counters and random numbers after an optimizer step; cheap enough to take after each.

    `ended` = the mini-epoch's end has been dealt with, so the next one comes.
    """
    loop: Any = trainer.fit_loop
    done = 0 if ended else loop.epoch_loop.batch_progress.current.ready
    over = done >= trainer.num_training_batches or (not ended and trainer.global_step >= trainer.max_steps)
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch + 1 if ended else trainer.current_epoch,
        "done": done,  # micro-batches of this mini-epoch
        "over": over,  # it has no more of them, and its end is still to come: validation, saves
        "stopped": trainer.should_stop,
        "random": random_state(trainer.strategy.root_device),
        "counters": module.counters(),
        "callbacks": {type(callback).__name__: callback.state_dict() for callback in callbacks_of(trainer)},
    }


def take_run_state(trainer: pl.Trainer, module: TrainingModule, state: dict[str, Any]) -> None:
    """Make the trainer stand where `run_state` was taken; for `on_train_start`, when Lightning has set itself up.

    The data loader skips `done` micro-batches itself (`EpochPositions`). The end of a mini-epoch that was not
    dealt with any more is dealt with now.
    """
    module.take_counters(state["counters"])
    for callback in callbacks_of(trainer):
        callback.load_state_dict(state["callbacks"].get(type(callback).__name__, {}))
    trainer.should_stop = state["stopped"]
    loop: Any = trainer.fit_loop  # its counters are no public part of Lightning
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state["step"]
    epochs = loop.epoch_progress.current
    epochs.ready = epochs.started = epochs.processed = epochs.completed = state["epoch"]
    set_random_state(state["random"], trainer.strategy.root_device)
    if state["over"]:
        epochs.ready = epochs.started = epochs.processed = state["epoch"] + 1
        for callback in callbacks_of(trainer):
            callback.on_train_epoch_end(trainer, module)
        epochs.completed = state["epoch"] + 1


def skip_batches(trainer: pl.Trainer, done: int) -> None:
    """Tell Lightning, at the first batch of a mini-epoch that is resumed, that `done` came before it."""
    loop: Any = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress.current
    batches.ready += done
    batches.started += done
    batches.processed += done
    batches.completed += done
    loop._data_fetcher.fetched += done
