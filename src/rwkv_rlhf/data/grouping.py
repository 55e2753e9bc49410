"""How long documents become segments that overlap by one token, and how examples run together."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")
NOTHING_TRAINED = "no trained token (a single token, or no assistant turn)"


class Segment(NamedTuple):
    """Tokens begin..end-1, of which `trained` are trained as targets."""

    begin: int
    end: int
    trained: int


def segments(begin: int, end: int, ctx_len: int, before: np.ndarray | None) -> Iterator[Segment]:
    """The document at begin..end-1 in segments of at most `ctx_len` inputs (0 = whole); those that train nothing are
    left out.

    before: trained tokens before each position, so that a segment is counted without looking at its tokens; None = all
    are trained.
    """
    for at in range(begin, end - 1, ctx_len or max(1, end - begin)):
        stop = min(end, at + ctx_len + 1) if ctx_len else end
        trained = stop - at - 1 if before is None else int(before[stop] - before[at + 1])
        if trained:
            yield Segment(at, stop, trained)


def grouped(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Neighbours in lists of at most `most` tokens, a longer item alone: always the same lists for the same items."""
    row: list[Item] = []
    held = 0
    for item in items:
        if row and held + size(item) > most:
            yield row
            row, held = [], 0
        row.append(item)
        held += size(item)
    if row:
        yield row
