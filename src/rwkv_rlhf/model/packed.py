"""Some ids of several rows as one packed row, each from its own state.

Legend: B rows, A ids of all of them, C width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.transfers import to_device


class Packed(NamedTuple):
    """hidden (A, C); where rows begin in it; the states behind them (None: there was nothing to run)."""

    hidden: Tensor
    starts: Starts
    after: State | None


def packed_rows(model: RWKV, rows: Sequence[Sequence[int]], state: State | None) -> Packed:
    """Run rows of ids (some may be empty), each from its row of `state`; None = before any text."""
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    starts = Starts(itertools.accumulate(map(len, rows), initial=0))
    hidden, after = model(to_device(ids, next(model.parameters()).device)[None], state=state, starts=starts)
    return Packed(hidden[0], starts, after)
