"""Losses: per-token scores from the chunked head, then one small pure function each.

To add a loss: one file with a subclass of `TextLoss` or `PairLoss`, and an entry in `tables.LOSSES`.
"""

from __future__ import annotations

from typing import Any

from rwkv_rlhf.losses.kinds import Loss
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import Implementations, load
from rwkv_rlhf.settings.tables import LossFacts


def _loss(facts: LossFacts) -> Loss[Any]:
    kind: type[Loss[Any]] = load(facts.implementation)
    return kind(facts)


# By the names of the setting `loss`.
LOSSES: Implementations[LossFacts, Loss[Any]] = Implementations(tables.LOSSES, _loss)
