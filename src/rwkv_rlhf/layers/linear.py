"""A matrix of the model: how it is stored and how it is applied. Adapters subclass these classes.

Legend: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.layers.stores.store import ExactBuffers, Store
from rwkv_rlhf.ops import products
from rwkv_rlhf.ops.product_ways import PLAIN, Ways


@dataclass(frozen=True)
class StorageSpec:
    """How a matrix is to be stored: packed as `store` says, or dense in `dtype`; adapters' tensors are in `master`.

    `generator` draws the adapter's first values. With `share` a dense matrix that already fits is not copied. PiSSA
    takes its initial factors from `initial` (by the names in its `initial`) or else computes them in `svd_niter`
    iterations.
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
        """`weight` as a frozen parameter of this dtype on this device."""
        stored = weight.detach().to(device=self.device, dtype=self.dtype, copy=not self.share)
        return nn.Parameter(stored, requires_grad=False)


class Matrix(ExactBuffers):
    """A matrix that takes `in_features` to `out_features`, without bias: what Linear and Embedding share.

    `weight` is the dense matrix, None while the matrix lives packed in `store`. An `Adapter` adds the parameters
    `tensors`; the other class attributes are explained there.
    """

    __call__: Callable[..., Tensor]  # PyTorch says Any
    adaptation: Adaptation | None = None
    tensors: tuple[str, ...] = ()
    factor_b: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    weight: nn.Parameter | None
    store: Store | None
    transposed = False  # whether `weight` is (in, out)
    ways: Ways = PLAIN  # how a CPU multiplies by `weight`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype))
        self.store = None

    def take_ways(self, ways: Ways) -> None:
        """Multiply by the matrix in these ways from now on, on a CPU."""
        self.ways = ways
        if self.store is not None:
            self.store.ways = ways

    def as_weight(self, matrix: Tensor) -> Tensor:
        """An (out, in) matrix laid out as `weight` is, and back."""
        return matrix.t() if self.transposed else matrix

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix as `weight` holds it, whether dense or packed."""
        sides = (self.in_features, self.out_features)
        return torch.Size(sides if self.transposed else sides[::-1])

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        """Hold the matrix `weight` as `spec` says, frozen."""
        assert weight.shape == self.shape, weight.shape
        store = store_class(spec.store)
        if store is None:
            self.store, self.weight = None, spec.dense(weight)
        else:
            self.store, self.weight = store.pack(weight.detach().to(spec.device)), None

    def on_meta(self, spec: StorageSpec) -> None:
        """As `load_weight`, on the meta device: dtypes and sizes without numbers."""
        store = store_class(spec.store)
        if store is None:
            self.weight = nn.Parameter(torch.empty(self.shape, dtype=spec.dtype, device="meta"), requires_grad=False)
        else:
            self.store, self.weight = store.on_meta(self.shape), None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The stored matrix in the shape of `weight`, without any adapter; unpacked when it is packed."""
        if self.store is not None and torch.compiler.is_compiling():
            found: Tensor = torch.ops.rwkv_rlhf.unpacked(*self.store.as_arguments(), dtype or torch.float32)
            return found
        if self.store is not None:
            return self.store.unpack(dtype or torch.float32)
        assert self.weight is not None
        return self.weight if dtype is None else self.weight.to(dtype)

    def merged(self) -> Tensor:
        """The matrix that this layer applies, float32 in the shape of `weight`. The only definition of merging."""
        return self.dense(torch.float32).detach()

    def extra_repr(self) -> str:
        stored = "dense" if self.store is None else self.store.mode
        return f"{self.in_features} -> {self.out_features}, {stored}"


class Linear(Matrix):
    """y = x W^T, `weight` (out, in)."""

    def base(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) by the stored matrix alone, computed in x.dtype."""
        if self.store is not None:
            return self.store.linear(x)
        assert self.weight is not None
        if products.few(x, self.weight):
            return products.product(x, self.weight)
        return self.ways.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), computed in x.dtype: a float32 master works with bfloat16 activations."""
        return self.base(x)


class Embedding(Matrix):
    """Rows of `weight` (V, C) by token number: in_features V, out_features C. It is never packed: only the rows of a
    batch are read."""

    weight: nn.Parameter
    transposed = True
    row_gradient = False  # whether its gradient holds the rows of the tokens that occurred, not the whole table

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        assert spec.store == "none"
        super().load_weight(weight, spec)

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """tokens (...,) int64 -> (..., C) in `dtype`, or in the table's own; rows are gathered before the cast."""
        rows = F.embedding(tokens, self.weight, sparse=self.row_gradient)
        return rows if dtype is None else rows.to(dtype)


class TokenTable(Embedding):
    """A table so large that a gradient of all of it is never made: it is sparse (torch.sparse_coo, one sparse axis)."""

    row_gradient = True
