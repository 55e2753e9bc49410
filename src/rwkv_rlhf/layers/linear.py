"""A matrix of the model: how it is stored and how it is applied. Adapters subclass these two classes.

Legend: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.layers.stores.store import ExactBuffers, Store


@dataclass(frozen=True)
class StorageSpec:
    """In what form a matrix is taken: `store` packs it, `dtype` is that of a dense one, `master` that of adapters.

    `generator` draws the adapter's first values. With `share` a dense matrix that already fits is not copied. PiSSA
    takes its initial factors from `initial` (by the names in its `initial`) or else, with `svd_niter` iterations, anew.
    """

    dtype: torch.dtype
    device: torch.device | str = "cpu"
    store: str = "none"
    master: torch.dtype = torch.float32
    generator: torch.Generator | None = None
    share: bool = False
    svd_niter: int = 4
    initial: Mapping[str, Tensor] | None = None

    def dense(self, weight: Tensor) -> nn.Parameter:
        """`weight` as a frozen parameter in this form."""
        placed = weight.detach().to(device=self.device, dtype=self.dtype, copy=not self.share)
        return nn.Parameter(placed, requires_grad=False)


class Linear(ExactBuffers):
    """y = x W^T without bias. `weight` is (out, in), or None when the matrix lives packed in `store`.

    Adapters say which parameters they add (`tensors`; `fast` are those that LoRA+, arXiv 2402.12354, trains at a higher
    rate) and which buffers outside the state dict they began with and cannot be merged without (`initial`).
    """

    adaptation: Adaptation | None = None
    tensors: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.store: Store | None = None

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        """Hold the matrix `weight` (out, in) as `spec` says, frozen. Adapters also start their own tensors."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        store = store_class(spec.store)
        if store is None:
            self.store, self.weight = None, spec.dense(weight)
        else:
            self.store, self.weight = store.pack(weight.detach().to(spec.device)), None

    def adopt_form(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the form that the adapter's own `tensors` of a checkpoint have, where an older program had another."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The stored matrix as (out, in), without any adapter; unpacked when it is packed."""
        if self.store is not None:
            return self.store.unpack(dtype or torch.float32)
        return self.weight if dtype is None else self.weight.to(dtype)

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


class Embedding(ExactBuffers):
    """Rows of `weight` (V, C) by token number. A table is never packed: only the rows of a batch are read."""

    adaptation: Adaptation | None = None
    tensors: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        """Hold the table `weight` (V, C) as `spec` says, frozen. Adapters also start their own tensors."""
        assert weight.shape == (self.num_embeddings, self.embedding_dim), weight.shape
        assert spec.store == "none"
        self.weight = spec.dense(weight)

    def adopt_form(self, tensors: Mapping[str, Tensor]) -> None:
        """As `Linear.adopt_form`."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table (V, C) without any adapter."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def merged(self) -> Tensor:
        """The table that this layer applies, (V, C) float32. The only definition of merging."""
        return self.dense(torch.float32).detach()

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """tokens (...,) int64 -> (..., C) in `dtype`, or in the table's own; rows are gathered before the cast."""
        rows = F.embedding(tokens, self.weight)
        return rows if dtype is None else rows.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}"
