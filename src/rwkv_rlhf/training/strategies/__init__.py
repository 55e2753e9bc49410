"""How processes share the work: --strategy as a table of makers, each giving Lightning a strategy of its own.

`ddp` keeps the whole model on every rank and adds up gradients; what the others split among the ranks is said in their
files.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.training.strategies.deepspeed import Zero


def make_strategy(config: Config, model: RWKV) -> Strategy | str:
    """What --strategy names (`tables.STRATEGIES`), for Lightning's trainer."""
    strategy: Strategy | str = load(tables.STRATEGIES[config.strategy].implementation)(config, model)
    return strategy


def clips_itself(trainer: pl.Trainer) -> bool:
    """Whether the strategy clips the gradient, and leaves out steps whose norm is not a number, in its own step."""
    return isinstance(trainer.strategy, Zero)


def norm_of_last_step(trainer: pl.Trainer) -> float:
    """With a strategy that clips itself: the norm before clipping, nan when the step was left out."""
    assert isinstance(trainer.strategy, Zero)
    return trainer.strategy.gradient_norm


def gradient_norm(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """() the norm of the whole gradient over all parameters and ranks."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def leaves_out_itself(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Whether an optimizer on a GPU can be told by a number there that the step is left out (`found_inf`), so that the
    host need not know the gradient's norm before it queues the update."""
    able = getattr(optimizer, "_step_supports_amp_scaling", False)
    spread = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    return bool(norm.is_cuda and able and not spread)


def own_states(trainer: pl.Trainer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(what the optimizer updates on this rank, its state of it), always in the same order: the parameters, or
    DeepSpeed's float32 shares of them. A state is empty before the first step."""
    optimizer: Any = trainer.optimizers[0]
    if isinstance(trainer.strategy, Zero):
        shares = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
        return [(share, optimizer.optimizer.state[share]) for share in shares]
    return [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


def rank_state(trainer: pl.Trainer) -> dict[str, dict[str, Tensor]]:
    """What this rank alone must keep, beside the trained tensors of the model, to go on exactly: the optimizer's state
    of what this rank updates, the tensors themselves by number and name."""
    return {
        str(number): {name: local(value).detach() for name, value in state.items()}
        for number, (_, state) in enumerate(own_states(trainer))
    }


def load_rank_state(trainer: pl.Trainer, state: dict[str, dict[str, Tensor]]) -> None:
    """Take up what `rank_state` gave, on the same rank of as many under the same strategy; the model's trained tensors
    must be back in the model before the strategy splits it. Raises ValueError when it is of another run."""
    own = own_states(trainer)
    if sorted(state) != sorted(str(number) for number in range(len(own))):
        raise ValueError(f"the optimizer's state is of {len(state)} tensors, this run has {len(own)} on this rank")
    for number, (parameter, current) in enumerate(own):
        current.clear()
        for name, value in state[str(number)].items():
            if value.dim() and value.shape != local(parameter).shape:
                raise ValueError(
                    f"the optimizer's {name} of tensor {number} is {tuple(value.shape)} instead of "
                    f"{tuple(local(parameter).shape)}: it is of another run, or of another number of ranks"
                )
            current[name] = _like(parameter, value.to(parameter.device))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` split as `parameter` is; a count of steps is not."""
    if not isinstance(parameter, DTensor) or not value.dim():
        return value.clone()
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value.clone(), mesh, places, shape=parameter.shape, stride=parameter.stride())
