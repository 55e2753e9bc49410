"""How much of a checkpoint is merged, block by block: `--layer_filter "0-3 0.2*4-24"`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.settings import tables

Value = TypeVar("Value")
ENDS = ("emb", "head")


@dataclass(frozen=True)
class MergeShares:
    """The share of each row (emb, a block's number, head) in the merged model; None = everything, wholly.

    Rows that a filter does not name stay as in the base. ln0 goes with emb, ln_out and scalar heads with head.
    """

    rows: Mapping[str, float] | None = None

    def of(self, name: str) -> float:
        """The share of a tensor or a layer, such as `blocks.3.att.key`."""
        if self.rows is None:
            return 1.0
        words = name.split(".")
        if words[0] == "blocks":
            row = "emb" if words[2] == "ln0" else words[1]
        else:
            row = "head" if words[0] in ("ln_out", *tables.SCALAR_HEADS) else words[0]
        return self.rows.get(row, 0.0)

    @property
    def whole(self) -> bool:
        """Whether every row is either merged as it was trained or left alone."""
        return self.rows is None or set(self.rows.values()) <= {0.0, 1.0}

    def of_layout(self, layout: Layout) -> Layout:
        """`layout` without the rows that stay as in the base."""
        return replace(
            layout,
            adapted={name: how for name, how in layout.adapted.items() if self.of(name)},
            packed=frozenset(name for name in layout.packed if self.of(name)),
            trained=frozenset(name for name in layout.trained if self.of(name)),
        )

    def of_tensors(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """A checkpoint's tensors without those rows."""
        return {name: tensor for name, tensor in tensors.items() if self.of(name)}


def parse_merge_shares(text: str, n_layer: int) -> MergeShares:
    """`0-3 0.2*4-24 head`: rows or ranges of them, each with an optional factor >= 0; blanks or commas between.

    Raises ValueError for other words, for blocks that the model does not have, and for a row that is named twice.
    """
    rows: dict[str, float] = {}

    def wrong(word: str, why: str) -> ValueError:
        return ValueError(f"--layer_filter {text!r}: {word!r} {why}")

    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"(?:([0-9.eE+-]+)\*)?(?:(emb|head)|(\d+)(?:-(\d+))?)", word)
        try:
            factor = float(match[1] or 1.0) if match else math.nan
        except ValueError:
            factor = math.nan
        if match is None or not 0 <= factor < math.inf:
            raise wrong(word, "is not rows such as 3, 0-3, emb or head, with an optional factor as in 0.2*4-24")
        if match[2]:
            named = [match[2]]
        else:
            first, last = int(match[3]), int(match[4] or match[3])
            if not first <= last < n_layer:
                raise wrong(word, f"is not within blocks 0-{n_layer - 1}")
            named = [str(block) for block in range(first, last + 1)]
        for row in named:
            if row in rows:
                raise wrong(word, f"names row {row} a second time")
            rows[row] = factor
    if not any(rows.values()):
        raise ValueError(f"--layer_filter {text!r} leaves every layer as in the base")
    return MergeShares(rows)
