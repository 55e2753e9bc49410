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

from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.plan import is_token_table
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.training.strategies.ddp import average_rows
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


def finish_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Put together over the ranks what the backward pass has left apart: the rows of tables by token."""
    if ranks.is_distributed():
        named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
        average_rows(p for name, p in named if is_token_table(name))


def gradient_numbers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients as they lie in memory; of a sparse one the rows that it has."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [gradient.values() if gradient.is_sparse else gradient for gradient in found]


def gradient_norm(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """() the norm of the whole gradient over all parameters and ranks."""
    norm = torch.nn.utils.get_total_norm(gradient_numbers(optimizer))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def leaves_out_itself(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Whether an optimizer on a GPU can be told by a number there that the step is left out (`found_inf`), so that the
    host need not know the gradient's norm before it queues the update."""
    able = getattr(optimizer, "_step_supports_amp_scaling", False)
    spread = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    return bool(norm.is_cuda and able and not spread)


def own_states(trainer: pl.Trainer) -> list[tuple[Tensor, dict[str, Any]]]:
    """(what the optimizer updates on this rank, its state of it), always in the same order: the parameters, or
    DeepSpeed's float32 shares of them. A state is empty before the first step."""
    optimizer: Any = trainer.optimizers[0]
    if isinstance(trainer.strategy, Zero):
        shares = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
        return [(share, optimizer.optimizer.state[share]) for share in shares]
    return [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


def rank_state(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """What this rank alone must keep, beside the trained tensors of the model, to go on exactly: the optimizer's state
    of what this rank updates, the tensors themselves and plain numbers, by number and name."""
    return {
        str(number): {name: _kept(value) for name, value in state.items()}
        for number, (_, state) in enumerate(own_states(trainer))
    }


def _kept(value: Any) -> Any:
    return local(value).detach() if isinstance(value, Tensor) else value


def load_rank_state(trainer: pl.Trainer, state: dict[str, dict[str, Any]]) -> None:
    """Take up what `rank_state` gave, on the same rank of as many under the same strategy; the model's trained tensors
    must be back in the model before the strategy splits it. Raises ValueError when it is of another run."""
    own = own_states(trainer)
    if sorted(state) != sorted(str(number) for number in range(len(own))):
        raise ValueError(f"the optimizer's state is of {len(state)} tensors, this run has {len(own)} on this rank")
    for number, (parameter, current) in enumerate(own):
        shape = local(parameter).shape
        tensors = {name: value for name, value in state[str(number)].items() if isinstance(value, Tensor)}
        shapes = {value.shape for value in tensors.values() if value.dim()}
        rows = shape[:1] in shapes and any(other[1:] == shape[1:] for other in shapes)  # of those that occurred
        if shapes and not (shape in shapes or rows):  # beside a moment there may be its scales
            found = ", ".join(str(tuple(other)) for other in sorted(shapes))
            raise ValueError(
                f"the optimizer's state of tensor {number} is {found} instead of {tuple(shape)}: it is of another run, "
                "or of another number of ranks"
            )
        current.clear()
        current.update(state[str(number)])
        current.update({name: _like(parameter, value.to(parameter.device)) for name, value in tensors.items()})


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` split as `parameter` is; a count of steps is not."""
    if not isinstance(parameter, DTensor) or not value.dim():
        return value.clone()
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value.clone(), mesh, places, shape=parameter.shape, stride=parameter.stride())
