"""Matrices of the model: storages (`stores.STORES`) times adapters (`ADAPTERS`).

A new adapter is one file with a subclass of `Linear` (and one of `Embedding`, if tables can have it) and a line here.
"""

from typing import NamedTuple

from rwkv_rlhf.layers.adapters.bone import Bone
from rwkv_rlhf.layers.adapters.dora import DoRA
from rwkv_rlhf.layers.adapters.lora import LoRA, LoRAEmbedding
from rwkv_rlhf.layers.adapters.miss import MiSS
from rwkv_rlhf.layers.adapters.pissa import PiSSA, PiSSAEmbedding
from rwkv_rlhf.layers.linear import Embedding, Linear


class Adapter(NamedTuple):
    """Classes of one mode. Each has `wrap(layer, adaptation)`, which raises RankError,
    `rank_of(first tensor)`, `load_weight`, `merged`, `tensors`, `fast` and `initial`."""

    linear: type[Linear]
    embedding: type[Embedding] | None


ADAPTERS = {
    "lora": Adapter(LoRA, LoRAEmbedding),
    "pissa": Adapter(PiSSA, PiSSAEmbedding),
    "bone": Adapter(Bone, None),
    "dora": Adapter(DoRA, None),
    "miss": Adapter(MiSS, None),
}
