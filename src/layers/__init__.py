"""Matrices of the model: storages (`stores.STORES`) times adapters (`ADAPTERS`).

A new adapter is one file with a subclass of `Linear` (and one of `Embedding`, if tables can have it) and a line here.
"""

from typing import NamedTuple

from src.layers.bone import Bone
from src.layers.dora import DoRA
from src.layers.linear import Embedding, Linear
from src.layers.lora import LoRA, LoRAEmbedding
from src.layers.miss import MiSS
from src.layers.pissa import PiSSA, PiSSAEmbedding


class Adapter(NamedTuple):
    """Classes of one mode. Each has `over(layer, adaptation)`, which raises RankError,
    `rank_of(first tensor)`, `take`, `merged`, `tensors`, `fast` and `initial`."""

    linear: type[Linear]
    embedding: type[Embedding] | None


ADAPTERS = {
    "lora": Adapter(LoRA, LoRAEmbedding),
    "pissa": Adapter(PiSSA, PiSSAEmbedding),
    "bone": Adapter(Bone, None),
    "dora": Adapter(DoRA, None),
    "miss": Adapter(MiSS, None),
}
