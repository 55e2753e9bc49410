"""From a table's entry to the class or function that it names, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

Facts = TypeVar("Facts")
Made = TypeVar("Made")


def load(implementation: str) -> Any:
    """What "package.module:name", or ".module:name" in this package, names.

    Raises ImportError or AttributeError when there is no such thing.
    """
    module, _, name = implementation.partition(":")
    return getattr(importlib.import_module(module, "rwkv_rlhf"), name)


class Implementations(Mapping[str, Made], Generic[Facts, Made]):
    """What a table's entries make, by the same names: made when it is asked for, and never behind the table.

    `make` gives what an entry's facts stand for; entries that are not `built` are left out.
    """

    def __init__(
        self, table: Mapping[str, Facts], make: Callable[[Facts], Made], built: Callable[[Facts], object] = bool
    ) -> None:
        self.table, self.make, self.built = table, make, built

    def __getitem__(self, name: str) -> Made:
        if not self.built(self.table[name]):
            raise KeyError(name)
        return self.make(self.table[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name, facts in self.table.items() if self.built(facts))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def with_fact(table: Mapping[str, Facts], fact: Callable[[Facts], object]) -> tuple[str, ...]:
    """The names in `table` whose facts satisfy `fact`, in the table's order."""
    return tuple(name for name, facts in table.items() if fact(facts))
