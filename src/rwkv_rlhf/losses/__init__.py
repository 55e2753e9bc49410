"""Losses: per-token scores from the chunked head, then one small pure function each.

To add a loss: one file with a subclass of `TextLoss` or `PairLoss`, and an entry in `tables.LOSSES`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rwkv_rlhf.losses.kinds import Loss
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.tables import Implementations, LossFacts, load


def _loss(facts: LossFacts) -> Loss:
    return load(facts.implementation)()


# By the names of the setting `loss`; those that are not built yet are left out.
LOSSES: Implementations[LossFacts, Loss] = Implementations(tables.LOSSES, _loss, lambda facts: facts.implementation)


def step_loss(loss: Loss, head: nn.Module, hidden: Tensor, batch: Any, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of one micro-batch -> (objective, metrics), both sums over its trained tokens or pairs.

    `hidden` (T,C) belongs to `batch.targets` (T,). `config` has the attributes `head_chunk`, `l2wrap` (None: the loss's
    own default) and those that `loss.settings` names. The caller divides by the optimizer step's total.
    """
    return loss.from_hidden(head, hidden, batch, chunk=config.head_chunk, **loss_settings(loss, config))


def loss_settings(loss: Loss, config: Any) -> dict[str, Any]:
    """`l2wrap` and the settings of the loss, as keywords of its `from_hidden` and `from_scores`."""
    l2wrap = loss.l2wrap if config.l2wrap is None else bool(config.l2wrap)
    return {"l2wrap": l2wrap, **{name: getattr(config, name) for name in loss.settings}}
