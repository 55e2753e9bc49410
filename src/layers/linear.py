"""A matrix of the model: how it is stored and how it is applied. Adapters subclass these two classes.

Legend: B batch, T tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x W^T without bias. `weight` is (out, in), or None when the matrix lives packed in `store`."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.store = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen or trained matrix as (out, in), without any adapter; unpacked when it is packed."""
        weight = self.weight if self.store is None else self.store.unpack()
        return weight if dtype is None else weight.to(dtype)

    def merged(self) -> Tensor:
        """The matrix that this layer applies, (out, in) float32. The only definition of merging."""
        return self.dense(torch.float32).detach()

    def base(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) by the stored matrix alone, computed in x.dtype."""
        if self.store is None:
            return F.linear(x, self.weight.to(x.dtype))
        return self.store.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), computed in x.dtype: a float32 master works with bfloat16 activations."""
        return self.base(x)

    def extra_repr(self) -> str:
        stored = "dense" if self.store is None else self.store.mode
        return f"{self.in_features} -> {self.out_features}, {stored}"


class Embedding(nn.Module):
    """Rows of `weight` (V, C) by token number."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table (V, C) without any adapter."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def merged(self) -> Tensor:
        """The table that this layer applies, (V, C) float32. The only definition of merging."""
        return self.dense(torch.float32).detach()

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """tokens (..., ) int64 -> (..., C) in `dtype`, or in the table's own; rows are gathered before the cast."""
        rows = F.embedding(tokens, self.weight)
        return rows if dtype is None else rows.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}"
