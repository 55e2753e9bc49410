"""Held-out pairs whose rejected answer is still ahead of the chosen one, as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample

SHOWN = 20
LONGEST = 400  # characters of a text


def wrong_pairs(pairs: Sequence[PairExample], margins: Tensor, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """`count` of pairs whose margin (n,) is below 0, `of` how many, and the texts of the worst as `pairs`."""
    wrong = torch.nonzero(margins < 0)[:, 0]
    order = wrong[margins[wrong].argsort()].tolist()

    def text(ids: Sequence[int]) -> str:
        whole = decode(list(ids))
        return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} ..."

    shown = [
        {
            "prompt": text(pairs[row].prompt),
            "chosen": text(pairs[row].chosen),
            "reject": text(pairs[row].reject),
            "margin": f"{float(margins[row]):.4g}",
        }
        for row in order[:SHOWN]
    ]
    return {"count": len(order), "of": len(margins), "pairs": shown}
