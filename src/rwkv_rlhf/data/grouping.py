"""Neighbours grouped by their number of tokens, for passes that need no other order."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def group_by_tokens(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
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
