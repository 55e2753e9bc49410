"""Where in the model a block is, and the patterns of initial values that several versions make of that.

Source: RWKV-LM 524481d, constructors and `generate_init_weight` of RWKV-v4neo/src/model.py (x040), RWKV-v5/src/model.py
(x052, x060) and RWKV-v7/train_temp/src/model.py (x070).
Legend: C width, N head size, c number of a channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Position:
    """Block `layer` of `n_layer`, and its sizes (the attention is as wide as the model: the tradition has no other).

    `low_rank`: inner sizes of a model that exists; empty = the tradition's for a new one of this width.
    """

    layer: int
    n_layer: int
    C: int
    N: int
    ffn: int
    generator: torch.Generator
    low_rank: Mapping[str, int] = field(default_factory=dict)

    @property
    def depth(self) -> float:
        """0 in the first block, 1 in the last."""
        return self.layer / max(1, self.n_layer - 1)

    @property
    def height(self) -> float:
        """1 in the first block, almost 0 in the last."""
        return 1.0 - self.layer / self.n_layer

    def channels(self) -> Tensor:
        """0, 1, ..., C - 1; real numbers also where only shapes are made, whose arithmetic imports torch._dynamo."""
        return torch.arange(self.C, dtype=torch.float32, device="cpu")

    def power(self, exponent: float) -> Tensor:
        """(c / C)^exponent, (1, 1, C)."""
        return ((self.channels() / self.C) ** exponent).view(1, 1, self.C)

    def slope(self) -> Tensor:
        """From 0 to 1 over the channels, (C,)."""
        return self.channels() / max(1, self.C - 1)

    def zigzag(self) -> Tensor:
        """0, 1, -1, 0, 1, -1, ...: neighbours differ (C,)."""
        return (self.channels() + 1) % 3 - 1

    def slow_decay(self) -> Tensor:
        """time_decay of x052 and x060, (C,)."""
        return -6 + 5 * self.slope() ** (0.7 + 1.3 * self.depth)

    def own_shares(self) -> dict[str, Tensor]:
        """How much of each token's own input k, v, r and g see at first (x040 to x060), each (1, 1, C)."""
        key, gate = self.power(self.height), self.power(0.5 * self.height)
        return {"k": key, "v": key + 0.3 * self.depth, "r": gate, "g": gate.clone()}

    def norm(self) -> dict[str, Tensor]:
        """ln_x: longer in later blocks."""
        weight = torch.full((self.C,), ((1 + self.layer) / self.n_layer) ** 0.7)
        return {"ln_x.weight": weight, "ln_x.bias": torch.zeros(self.C)}

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in +-0.01."""
        return torch.empty(shape).uniform_(-0.01, 0.01, generator=self.generator)

    def orthogonal(self, rows: int, columns: int, gain: float) -> Tensor:
        """A (rows, columns) matrix whose rows or columns are orthogonal and `gain` long; zeros for 0."""
        if gain == 0:
            return torch.zeros(rows, columns)
        return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain, generator=self.generator)
