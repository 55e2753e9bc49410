"""The storages of a frozen matrix, by the names of `tables.STORAGES` (`--quant_mode`)."""

from __future__ import annotations

from rwkv_rlhf.layers.stores.store import Store
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import Implementations, load
from rwkv_rlhf.settings.tables import StorageFacts


def _store(facts: StorageFacts) -> type[Store]:
    store: type[Store] = load(facts.implementation)
    return store


STORES: Implementations[StorageFacts, type[Store]] = Implementations(tables.STORAGES, _store)


def store_class(mode: str) -> type[Store] | None:
    """The store of a storage's name; None for `none`, a dense matrix. Raises ValueError with the legal modes."""
    if mode == tables.DENSE:
        return None
    if mode not in STORES:
        raise ValueError(f"storage {mode} is unknown: the storages of this program are none, {', '.join(STORES)}")
    return STORES[mode]
