"""The storages of a frozen matrix, by the names of `--quant_mode`.

| mode | bytes per parameter | relative error of a normal matrix (RMS) |
|---|---|---|
| fp8 | 1 + 4 / in | 2.6 % |
| int8 | 1 + 4 / 64 = 1.0625 | 0.6 % |
| nf4, fp4 | 1 / 2 + 4 / 64 = 0.5625 | 9 %, 12 % |
"""

from __future__ import annotations

from rwkv_rlhf.layers.stores.fp8 import FP8
from rwkv_rlhf.layers.stores.int8 import Int8
from rwkv_rlhf.layers.stores.nf4 import FP4, NF4
from rwkv_rlhf.layers.stores.store import Store

# "none" keeps the matrix dense, as a parameter of its layer
STORES: dict[str, type[Store] | None] = {"none": None, "nf4": NF4, "fp4": FP4, "int8": Int8, "fp8": FP8}


def store_class(mode: str) -> type[Store] | None:
    """The store of a storage's name. Raises ValueError with the legal modes."""
    if mode not in STORES:
        raise ValueError(f"storage {mode} is unknown: the storages of this program are {', '.join(STORES)}")
    return STORES[mode]
