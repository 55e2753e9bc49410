"""How documents become examples, cut into pieces that overlap by one token, and how examples run grouped."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
NOTHING_TRAINED = "no trained token (a single token, or no assistant turn)"


def pieces(begin: int, end: int, ctx_len: int, before: np.ndarray | None) -> Iterator[tuple[int, int, int]]:
    """(begin, end, trained targets) of each piece of the document at begin..end-1 that trains anything.

    ctx_len: most inputs of a piece, 0 = never cut. before: trained tokens before each position, so that a piece is
    counted without looking at its tokens; None = all are trained.
    """
    for at in range(begin, end - 1, ctx_len or max(1, end - begin)):
        stop = min(end, at + ctx_len + 1) if ctx_len else end
        trained = stop - at - 1 if before is None else int(before[stop] - before[at + 1])
        if trained:
            yield at, stop, trained


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
