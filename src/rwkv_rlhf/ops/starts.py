"""Where the segments of a packed row begin, known to the host; what a device must know of it is copied there once.

S segments, T tokens
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from rwkv_rlhf.transfers import to_device


class Starts(Sequence[int]):
    """Cumulative lengths of segments, 0, ..., T: S + 1 numbers.

    Every block of a model and every loss asks for the same of them, so whoever runs a row makes one of these for it.
    """

    def __init__(self, edges: Iterable[int]) -> None:
        self.edges = tuple(edges)
        self._made: dict[tuple[Hashable, torch.device], Tensor] = {}

    @classmethod
    def of(cls, starts: Tensor | Sequence[int]) -> Starts:
        """Of an int64 tensor (S+1,) or as many numbers; itself if it is one already. A tensor on a GPU is waited for.

        Raises ValueError for another tensor.
        """
        if isinstance(starts, Starts):
            return starts
        if not isinstance(starts, Tensor):
            return cls(starts)
        if starts.dtype != torch.int64 or starts.dim() != 1 or starts.numel() < 2:
            raise ValueError(
                f"starts must be int64 of shape (segments + 1,), not {starts.dtype} of shape {tuple(starts.shape)}"
            )
        return cls(starts.tolist())

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self) -> Iterator[int]:
        return iter(self.edges)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Starts: ...
    def __getitem__(self, at: int | slice) -> int | Starts:
        return self.edges[at] if isinstance(at, int) else Starts(self.edges[at])

    def __repr__(self) -> str:
        return str(list(self.edges))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - begin for begin, end in itertools.pairwise(self.edges)]

    def fit(self, tokens: int) -> bool:
        """Whether they rise from 0 to `tokens` without a step back."""
        return self._rise and self.edges[-1] == tokens

    @cached_property
    def _rise(self) -> bool:
        return self.edges[0] == 0 and min(self.lengths, default=0) >= 0

    @cached_property
    def some_empty(self) -> bool:
        """Whether a segment has no token."""
        return 0 in self.lengths

    @cached_property
    def tensor(self) -> Tensor:
        """(S+1,) int64 on the host."""
        return torch.tensor(self.edges)

    def on(self, device: torch.device, form: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of them on the host, on `device`: made and copied when its `form` is first asked for."""
        key = form, device
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False):  # it may be kept for a backward pass later
                self._made[key] = found = to_device(make(), device)
        return found

    def edges_on(self, device: torch.device) -> Tensor:
        """(S+1,) int64."""
        return self.on(device, "edges", lambda: self.tensor)

    def lengths_on(self, device: torch.device) -> Tensor:
        """(S,) int64, tokens of each segment."""
        return self.on(device, "lengths", lambda: torch.tensor(self.lengths))

    def last_on(self, device: torch.device) -> Tensor:
        """(S,) int64, the last token of each segment; any token for an empty one."""
        return self.on(device, "last", lambda: (self.tensor[1:] - 1).clamp(min=0))

    def empty_on(self, device: torch.device) -> Tensor:
        """(S,) bool, the segments without a token."""
        return self.on(device, "empty", lambda: torch.tensor(self.lengths) == 0)

    def filled_on(self, device: torch.device) -> Tensor:
        """The numbers of the segments that have tokens, int64."""
        return self.on(device, "filled", lambda: torch.tensor(self.lengths).nonzero()[:, 0])

    def first_on(self, device: torch.device) -> Tensor:
        """The first token of each segment that has tokens, int64."""
        return self.on(device, "first", lambda: self.tensor[:-1][torch.tensor(self.lengths) > 0])


@functools.lru_cache(maxsize=64)
def even_starts(rows: int, tokens: int) -> Starts:
    """Those of `rows` rows of `tokens` tokens each, laid end to end: a batch that is not packed."""
    return Starts(range(0, rows * tokens + 1, tokens)) if tokens else Starts([0] * (rows + 1))


@functools.lru_cache(maxsize=16)
def known_starts(edges: tuple[int, ...]) -> Starts:
    """Those of a packed row by their numbers; what rows of a step ask a device for is copied there once."""
    return Starts(edges)
