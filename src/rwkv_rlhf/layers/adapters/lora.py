"""LoRA (arXiv 2106.09685): W + scaling * B A, for a linear layer and for an embedding.

Legend: r rank, V vocabulary, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec


def first_factors(inner: int, outer: int, rank: int, spec: StorageSpec) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, inner) Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(inner), 1/sqrt(inner)); B (outer, r) zero.

    Drawn in float32 on the CPU, so that every device and precision starts with the same numbers.
    """
    bound = inner**-0.5
    a = torch.empty(rank, inner).uniform_(-bound, bound, generator=spec.generator)
    b = torch.zeros(outer, rank)
    return tuple(nn.Parameter(t.to(device=spec.device, dtype=spec.master)) for t in (a, b))


class LoRA(Linear):
    """y = x W^T + scaling * (drop(x) A^T) B^T with lora_A (r, in), lora_B (out, r). Starts as the base (B = 0)."""

    tensors = ("lora_A", "lora_B")
    fast = ("lora_B",)

    def __init__(self, in_features: int, out_features: int, adaptation: Adaptation, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.adaptation = adaptation
        self.lora_A = nn.Parameter(torch.empty(adaptation.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, adaptation.rank, device=device))

    @staticmethod
    def rank_of(lora_A: Tensor) -> int:
        """The rank, from the first of `tensors`."""
        return lora_A.shape[0]

    @classmethod
    def wrap(cls, linear: Linear, adaptation: Adaptation) -> LoRA:
        """An adapter for the shape of `linear`, on the meta device: `load_weight` gives it numbers."""
        return cls(linear.in_features, linear.out_features, adaptation, device="meta")

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        super().load_weight(weight, spec)
        factors = first_factors(self.in_features, self.out_features, self.adaptation.rank, spec)
        self.lora_A, self.lora_B = factors

    def merged(self) -> Tensor:
        delta = self.lora_B.detach().float() @ self.lora_A.detach().float()
        return torch.add(super().merged(), delta, alpha=self.adaptation.scaling)

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


class LoRAEmbedding(Embedding):
    """Row t of W + scaling * (B A)^T with lora_A (r, V), lora_B (C, r). A one-hot input has nothing to drop."""

    tensors = ("lora_A", "lora_B")
    fast = ("lora_B",)

    def __init__(self, num_embeddings: int, embedding_dim: int, adaptation: Adaptation, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.adaptation = adaptation
        self.lora_A = nn.Parameter(torch.empty(adaptation.rank, num_embeddings, device=device))
        self.lora_B = nn.Parameter(torch.empty(embedding_dim, adaptation.rank, device=device))

    rank_of = LoRA.rank_of

    @classmethod
    def wrap(cls, embedding: Embedding, adaptation: Adaptation) -> LoRAEmbedding:
        """An adapter for the shape of `embedding`, on the meta device: `load_weight` gives it numbers."""
        return cls(embedding.num_embeddings, embedding.embedding_dim, adaptation, device="meta")

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        super().load_weight(weight, spec)
        factors = first_factors(self.num_embeddings, self.embedding_dim, self.adaptation.rank, spec)
        self.lora_A, self.lora_B = factors

    def merged(self) -> Tensor:
        delta = (self.lora_B.detach().float() @ self.lora_A.detach().float()).t()
        return torch.add(super().merged(), delta, alpha=self.adaptation.scaling)

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        rows = super().forward(tokens)
        dtype = dtype or rows.dtype
        # few rows, so the update is added before rounding to the table's dtype
        delta = F.linear(F.embedding(tokens, self.lora_A.t()), self.lora_B)
        return torch.add(rows.to(delta.dtype), delta, alpha=self.adaptation.scaling).to(dtype)
