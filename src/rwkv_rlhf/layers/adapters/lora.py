"""LoRA (arXiv 2106.09685): W + scaling * B A, for a linear layer and for an embedding.

Legend: r rank, V vocabulary, C width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec


class LowRank(Adapter):
    """The two factors of LoRA: lora_A (r, in) and lora_B (out, r). Of an embedding `in` is V and `out` is C."""

    tensors: tuple[str, ...] = ("lora_A", "lora_B")
    factor_b = ("lora_B",)
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        rank = self.adaptation.rank
        return {"lora_A": (rank, self.in_features), "lora_B": (self.out_features, rank)}

    def first_values(self, spec: StorageSpec) -> Mapping[str, Tensor]:
        """A Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)); B zero.

        Drawn in float32 on the CPU, so that every device and precision starts with the same numbers.
        """
        bound = self.in_features**-0.5
        a = torch.empty(self.adaptation.rank, self.in_features).uniform_(-bound, bound, generator=spec.generator)
        return {"lora_A": a, "lora_B": torch.zeros(self.out_features, self.adaptation.rank)}

    def merged(self) -> Tensor:
        update = self.as_weight(self.lora_B.detach().float() @ self.lora_A.detach().float())
        return torch.add(self.dense(torch.float32).detach(), update, alpha=self.adaptation.scaling)


class LoRA(LowRank, Linear):
    """y = x W^T + scaling * (drop(x) A^T) B^T. Starts as the base (B = 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.updated(self.base(x), F.dropout(x, self.adaptation.dropout, self.training))

    def updated(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., out) + scaling * (x A^T) B^T."""
        inner = F.linear(x, self.lora_A.to(x.dtype))
        rows = torch.addmm(
            y.reshape(-1, self.out_features),
            inner.reshape(-1, self.adaptation.rank),
            self.lora_B.to(x.dtype).t(),
            alpha=self.adaptation.scaling,
        )  # one pass over y instead of three
        return rows.view(y.shape)


class LoRAEmbedding(LowRank, Embedding):
    """Row t of W + scaling * (B A)^T. A one-hot input has nothing to drop."""

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        rows = super().forward(tokens)
        # few rows, so the update is added before rounding to the table's dtype
        update = F.linear(F.embedding(tokens, self.lora_A.t()), self.lora_B)
        return torch.add(rows.to(update.dtype), update, alpha=self.adaptation.scaling).to(dtype or rows.dtype)
