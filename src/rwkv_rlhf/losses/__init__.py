"""Losses: per-token scores from the chunked head, then one small pure function each.

To add a loss: one file with a subclass of `TextLoss` or `PairLoss`, and one line in `LOSSES`.
"""

from typing import Any

from torch import Tensor, nn

from rwkv_rlhf.losses.cpo import CPO
from rwkv_rlhf.losses.distill import Distillation
from rwkv_rlhf.losses.dpo import DPO
from rwkv_rlhf.losses.kinds import Loss
from rwkv_rlhf.losses.kto import KTO
from rwkv_rlhf.losses.orpo import ORPO
from rwkv_rlhf.losses.sft import SFT
from rwkv_rlhf.losses.simpo import SimPO
from rwkv_rlhf.losses.wpo import WPO

# By the name of the setting `loss`; "" is next-token training on plain text.
LOSSES: dict[str, Loss] = {
    "": SFT(),
    "sft": SFT(),
    "distillation": Distillation(),
    "dpo": DPO(),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
    "kto": KTO(),
    "wpo": WPO(),
}


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
