"""RWKV models. `VERSIONS` maps a version to its block class, imported when it is asked for (`tables.VERSIONS`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import Implementations, load
from rwkv_rlhf.settings.tables import VersionFacts

if TYPE_CHECKING:
    from rwkv_rlhf.model.blocks import Block


def _block(facts: VersionFacts) -> type[Block]:
    block: type[Block] = load(facts.block)
    return block


VERSIONS: Implementations[VersionFacts, type[Block]] = Implementations(tables.VERSIONS, _block)
