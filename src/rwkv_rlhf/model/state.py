"""What a recurrent model remembers between two calls.

Legend: B rows (or S packed segments), C width, A attention width, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops.starts import Starts


class LayerState(NamedTuple):
    """Memory of one block: the last normalised inputs of its two halves and the state of the recurrence.

    An empty state is None in place of the whole tuple: x040's would not be zeros (its scale pp is -1e38).
    """

    att_shift: Tensor  # (B, C) compute dtype
    wkv: Tensor  # (B, H, N_value, N_key), x040: (B, A, 3), float32 (float64 in float64 runs)
    ffn_shift: Tensor  # (B, C) compute dtype


@dataclass(frozen=True, eq=False)
class State:
    """One `LayerState` per block; every tensor has one row per sequence (or per packed segment)."""

    layers: tuple[LayerState, ...]

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.layers[0].wkv)

    def tensors(self) -> list[Tensor]:
        """All tensors, block after block."""
        return [tensor for layer in self.layers for tensor in layer]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> State:
        """The inverse of `tensors`."""
        each = len(LayerState._fields)
        return cls(tuple(LayerState(*tensors[at : at + each]) for at in range(0, len(tensors), each)))

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """`change` of every tensor."""
        return State.from_tensors([change(tensor) for tensor in self.tensors()])

    def select(self, rows: Tensor) -> State:
        """Rows (K,) int64 -> a state of K rows. Repeating a row forks it; gradients of the copies add up."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    def row(self, number: int) -> State:
        """One row, as a view."""
        return self.map(lambda tensor: tensor[number : number + 1])

    @staticmethod
    def concatenated(states: Sequence[State]) -> State:
        """The rows of all `states`, in their order."""
        return State.from_tensors([torch.cat(parts) for parts in zip(*(s.tensors() for s in states), strict=True)])

    def __add__(self, other: State) -> State:
        """Sums of the tensors, as gradients of a state add up."""
        return State.from_tensors([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])


def carry(x: Tensor, last: Tensor | None, starts: Starts | None) -> Tensor:
    """The token-shift memory after `x`: the last row of each sequence, (B, C), or of each segment, (S, C).

    An empty segment keeps what it came with (`last`, zeros if None).
    """
    if starts is None:
        return x[:, -1]
    if torch.compiler.is_compiling():  # an operator of model/in_graph.py; `starts` is a tensor then
        found: Tensor = torch.ops.rwkv_rlhf.carry(x, last, starts)
        return found
    rows = x[0].index_select(0, starts.last_on(x.device))  # (S, C)
    if not starts.some_empty:
        return rows
    before = torch.zeros_like(rows) if last is None else last.to(rows.dtype)
    return torch.where(starts.empty_on(x.device)[:, None], before, rows)
