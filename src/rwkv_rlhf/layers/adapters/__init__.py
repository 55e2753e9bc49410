"""Adapters by the names of `tables.ADAPTERS`: their classes, imported when they are asked for.

A new adapter is one file with a subclass of `Linear` (and one of `Embedding`, if embeddings can have it) and an entry
there.
"""

from __future__ import annotations

from typing import NamedTuple

from rwkv_rlhf.layers.linear import Embedding, Linear
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.tables import AdapterFacts, Implementations, load


class AdapterClasses(NamedTuple):
    """The adapter of a matrix, and that of an embedding's table if there is one."""

    linear: type[Linear]
    embedding: type[Embedding] | None


def _classes(facts: AdapterFacts) -> AdapterClasses:
    return AdapterClasses(load(facts.linear), load(facts.embedding) if facts.embedding else None)


ADAPTERS: Implementations[AdapterFacts, AdapterClasses] = Implementations(tables.ADAPTERS, _classes)
