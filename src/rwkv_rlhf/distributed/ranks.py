"""The processes that train together: their number, this one's rank, and the few collective operations they need.

With one process every function here costs nothing and does what its name says of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Whether more than one process trains."""
    return world_size() > 1


def world_size() -> int:
    """How many processes train."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def is_rank_zero() -> bool:
    """Whether this is rank 0, the one that writes files, logs and reports."""
    return rank() == 0


def device() -> torch.device:
    """Where tensors must be to be sent between ranks: NCCL takes those of a GPU only."""
    on_gpu = is_distributed() and distributed.get_backend() == distributed.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """The sum over all ranks of each of `numbers`; every rank passes equally many."""
    if not is_distributed() or not numbers:
        return list(numbers)
    totals = torch.tensor(list(numbers), dtype=torch.float64, device=device())
    distributed.all_reduce(totals)
    return totals.tolist()


def all_reduce_max(number: float) -> float:
    """The largest of the ranks' numbers."""
    if not is_distributed():
        return number
    found = torch.tensor(number, dtype=torch.float64, device=device())
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return float(found)


def all_gather(value: Value) -> list[Value]:
    """The `value` of each rank, in the order of ranks; plain values and CPU tensors."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def all_gather_rows(rows: Tensor) -> list[Tensor]:
    """The `rows` (n, ...) of each rank, in the order of ranks, where `rows` lie; ranks may have different n."""
    if not is_distributed():
        return [rows]
    counts = [torch.empty(1, dtype=torch.int64, device=device()) for _ in range(world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=device()))
    lengths = [int(count) for count in counts]
    sent = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=device())
    sent[: len(rows)] = rows
    found = [torch.empty_like(sent) for _ in lengths]
    distributed.all_gather(found, sent)
    return [part[:length].to(rows.device) for part, length in zip(found, lengths)]


def broadcast_from_zero(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank; the others do not call `make`."""
    if not is_distributed():
        return make()
    found: list[Any] = [make() if is_rank_zero() else None]
    distributed.broadcast_object_list(found, src=0, device=device())
    value: Value = found[0]
    return value


def agreed(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank; a ValueError of it is raised on all of them."""

    def tried() -> tuple[Value | None, str]:
        try:
            return make(), ""
        except ValueError as mistake:
            return None, str(mistake)

    if not is_distributed():
        return make()
    value, mistake = broadcast_from_zero(tried)
    if mistake:
        raise ValueError(mistake)
    return cast(Value, value)


def barrier() -> None:
    """Returns when every rank has called it."""
    if is_distributed():
        all_reduce_max(0.0)


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks hold parts of the tensors that train (FSDP, DeepSpeed stage 3), so that a forward pass of one
    needs all the others."""
    return is_distributed() and any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


@contextmanager
def full_tensor(parameter: Tensor) -> Iterator[Tensor]:
    """A whole parameter, of which each rank may hold a part; inside the block only, entered by all ranks together."""
    status = getattr(parameter, "ds_status", None)  # DeepSpeed's
    if status is not None and status.name != "AVAILABLE":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter.detach()
    elif hasattr(parameter, "full_tensor"):
        sharded: Any = parameter.detach()
        yield sharded.full_tensor()
    else:
        yield parameter.detach()


def split_over_ranks(work: Callable[[int], Value], count: int, model: nn.Module) -> list[Value]:
    """[work(0), ..., work(count - 1)], each done by one rank and known to all.

    Where each rank holds a part of the model, every rank does all of the work, in step with the others.
    """
    if not is_distributed() or is_sharded(model):
        return [work(number) for number in range(count)]
    parts = all_gather([work(number) for number in range(rank(), count, world_size())])
    return [parts[number % world_size()][number // world_size()] for number in range(count)]


def broadcast_parameters(tensors: Sequence[Tensor]) -> None:
    """Give every rank the numbers that rank 0 has in `tensors`, in place."""
    if is_distributed():
        with torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(device())
                distributed.broadcast(sent, src=0)
                tensor.copy_(sent)


def check_same(what: str, value: Any) -> None:
    """Raises ValueError, on every rank alike, when the `value` (plain numbers and texts) of a rank is not rank 0's.

    `what` completes the sentence "rank 1 has another ...".
    """
    values = all_gather(value)
    other = next((number for number, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise ValueError(f"rank {other} has another {what} than rank 0: {values[other]!r} instead of {values[0]!r}")
