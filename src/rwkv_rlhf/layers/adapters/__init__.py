"""Adapters by the names of the layer profile's modes.

A new adapter is one file with a subclass of `Adapter` and `Linear` (and one of `Adapter` and `Embedding`, if tables can
have it) and a line here.
"""

from typing import NamedTuple

from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.adapters.bone import Bone
from rwkv_rlhf.layers.adapters.dora import DoRA
from rwkv_rlhf.layers.adapters.lora import LoRA, LoRAEmbedding
from rwkv_rlhf.layers.adapters.miss import MiSS
from rwkv_rlhf.layers.adapters.pissa import PiSSA, PiSSAEmbedding


class AdapterClasses(NamedTuple):
    """The classes of one mode: of a linear layer, and of an embedding if it can have this adapter."""

    linear: type[Adapter]
    embedding: type[Adapter] | None


ADAPTERS = {
    "lora": AdapterClasses(LoRA, LoRAEmbedding),
    "pissa": AdapterClasses(PiSSA, PiSSAEmbedding),
    "bone": AdapterClasses(Bone, None),
    "dora": AdapterClasses(DoRA, None),
    "miss": AdapterClasses(MiSS, None),
}
