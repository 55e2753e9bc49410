"""Losses: per-token scores from the chunked head, then one small pure function each.

To add a loss: one file with a subclass of `TextLoss` or `PairLoss`, and one line in `LOSSES`.
"""

from typing import Any

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
LOSSES: dict[str, Loss[Any]] = {
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
