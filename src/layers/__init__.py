"""Matrices of the model: storages (`stores.STORES`) times adapters (`ADAPTERS`).

A new adapter is one file with a subclass of `Linear` (and one of `Embedding`, if tables can have it) and a line here.
"""

from typing import NamedTuple

from src.layers.linear import Embedding, Linear
from src.layers.lora import LoRA, LoRAEmbedding


class Adapter(NamedTuple):
    """Classes of one mode. Each has `over(layer, adaptation)`, `take`, `merged` and `tensors`, its parameters."""

    linear: type[Linear]
    embedding: type[Embedding] | None


ADAPTERS = {
    "lora": Adapter(LoRA, LoRAEmbedding),
}
