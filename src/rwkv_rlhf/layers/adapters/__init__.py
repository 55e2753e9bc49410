"""Adapters by the names of `tables.ADAPTERS`: their classes, imported when they are asked for.

A new adapter is one file with a subclass of `Adapter` and `Linear` (and one of `Adapter` and `Embedding`, if embeddings
can have it) and an entry there.
"""

from __future__ import annotations

from typing import NamedTuple

from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import Implementations, load
from rwkv_rlhf.settings.tables import AdapterFacts


class AdapterClasses(NamedTuple):
    """The adapter of a matrix, and that of an embedding's table if there is one."""

    linear: type[Adapter]
    embedding: type[Adapter] | None


def _classes(facts: AdapterFacts) -> AdapterClasses:
    return AdapterClasses(load(facts.linear), load(facts.embedding) if facts.embedding else None)


ADAPTERS: Implementations[AdapterFacts, AdapterClasses] = Implementations(tables.ADAPTERS, _classes)
