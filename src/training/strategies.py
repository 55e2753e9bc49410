"""How processes share the work: --strategy as a table of makers, each giving Lightning a strategy of its own.

`ddp` keeps the whole model on every rank and adds up gradients; what the others split among the ranks is said in their
files.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from src.config import DEEPSPEED, Config
from src.model.checkpoint import kept
from src.training import ranks
from src.training.deepspeed import Zero, zero
from src.training.sharded import fsdp

Maker = Callable[[Config, nn.Module], Strategy | str]


def ddp(config: Config, model: nn.Module) -> Strategy | str:
    """The whole model on each rank. One process needs no strategy."""
    if not ranks.several():
        return "auto"
    ranks.same_start(list(kept(model).values()))
    return DDPStrategy(
        timeout=timedelta(minutes=config.timeout),
        init_sync=False,  # all ranks read the same file; what trains was sent above
        broadcast_buffers=False,  # packed matrices never change
        gradient_as_bucket_view=True,
    )


STRATEGIES: dict[str, Maker] = {"auto": ddp, "ddp": ddp, "fsdp": fsdp, **dict.fromkeys(DEEPSPEED, zero)}


def make_strategy(config: Config, model: nn.Module) -> Strategy | str:
    """What --strategy names, for Lightning's trainer."""
    return STRATEGIES[config.strategy](config, model)


def clips_itself(trainer: pl.Trainer) -> bool:
    """Whether the strategy clips the gradient, and leaves out steps whose norm is not a number, in its own step."""
    return isinstance(trainer.strategy, Zero)


def norm_of_last_step(trainer: pl.Trainer) -> float:
    """With a strategy that clips itself: the norm before clipping, nan when the step was left out."""
    return trainer.strategy.gradient_norm


def gradient_norm(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """() the norm of the whole gradient over all parameters and ranks."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def rank_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What this rank alone must keep, beside the trained tensors of the model, to go on exactly: tensors and plain
    numbers. With one process and under ddp that is the optimizer's state."""
    return trainer.optimizers[0].state_dict()


def load_rank_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Take up what `rank_state` gave, on the same rank of as many."""
    trainer.optimizers[0].load_state_dict(state)
