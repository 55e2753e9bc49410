"""What a recurrent model remembers between two calls.

Legend: B rows (or S packed segments), C width, A attention width, H heads, N head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerState(NamedTuple):
    """Memory of one block: the last normalised inputs of its two halves and the state of the recurrence.

    An empty state is None in place of the whole tuple: x040's would not be zeros (its scale pp is -1e38).
    """

    att_shift: Tensor  # (B, C) compute dtype
    wkv: Tensor  # (B, H, N_value, N_key), x040: (B, A, 3), float32 (float64 in float64 runs)
    ffn_shift: Tensor  # (B, C) compute dtype


class State(list[LayerState]):
    """One `LayerState` per block; every tensor has one row per sequence (or per packed segment)."""

    def index(self, rows: Tensor) -> State:  # type: ignore[override]
        """Rows (K,) int64 -> a state of K rows. Repeating a row forks it; gradients of the copies add up."""
        return State(LayerState(*(part.index_select(0, rows) for part in layer)) for layer in self)

    def detach(self) -> State:
        """The same values without history."""
        return State(LayerState(*(part.detach() for part in layer)) for layer in self)

    def joined(self, other: State) -> State:
        """The rows of this state, then those of `other`."""
        return State(
            LayerState(*(torch.cat(parts) for parts in zip(one, two, strict=True)))
            for one, two in zip(self, other, strict=True)
        )

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self[0].wkv.shape[0]


def carry(x: Tensor, last: Tensor | None, starts: Tensor | None) -> Tensor:
    """The token-shift memory after `x`: the last row of each sequence, (B, C), or of each segment, (S, C).

    An empty segment keeps what it came with (`last`, zeros if None). `starts` on the host spares waiting for a GPU.
    """
    if starts is None:
        return x[:, -1]
    begin, end = starts[:-1], starts[1:]
    rows = x[0].index_select(0, (end - 1).clamp(min=0).to(x.device, non_blocking=True))  # (S, C)
    empty = end == begin
    if not bool(empty.any()):
        return rows
    kept = torch.zeros_like(rows) if last is None else last.to(rows.dtype)
    return torch.where(empty[:, None].to(x.device, non_blocking=True), kept, rows)
