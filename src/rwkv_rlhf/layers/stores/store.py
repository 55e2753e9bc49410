"""What every storage of a frozen matrix can do. Each storage has a file of its own in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rwkv_rlhf.ops import products
from rwkv_rlhf.ops.product_ways import PLAIN, Ways
from rwkv_rlhf.ops.products import Packed

# Numbers that are unpacked at once: products of mixed types make float32 copies of all that a CPU is given.
PIECE = 1 << 20
PIECE_ON_GPU = 1 << 24


def scaled_rows(
    packed: Tensor, scale: Tensor, dtype: torch.dtype, values: Callable[[Tensor], Tensor] = lambda rows: rows
) -> Tensor:
    """values(packed) (rows, n) times scale (rows, 1) in float32, rounded once to a new tensor (rows, n) of `dtype`."""
    dense = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    piece = PIECE if packed.device.type == "cpu" else PIECE_ON_GPU
    step = max(1, piece // max(1, packed.shape[1]))
    for begin in range(0, len(packed), step):
        rows = slice(begin, begin + step)
        torch.mul(values(packed[rows]), scale[rows], out=dense[rows])
    return dense


class ExactBuffers(nn.Module):
    """A module whose own buffers follow moves between devices but no casts: `model.to(bfloat16)`, which trainers do,
    would round block scales, which is another matrix."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class Store(ExactBuffers):
    """A packed matrix of shape (out, in). It knows nothing of adapters. Its tensors are buffers outside the state dict.

    A new storage is one file with a subclass (`mode`, `pack`, `unpack`) and an entry in `tables.STORAGES`.
    """

    mode = ""
    ways: Ways = PLAIN  # how a CPU multiplies by the unpacked matrix

    def __init__(self, shape: torch.Size, **buffers: Tensor) -> None:
        super().__init__()
        self.shape = shape
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def pack(cls, weight: Tensor) -> Store:
        """Pack a dense (out, in) matrix of any float dtype on the device where it lies."""
        raise NotImplementedError

    @classmethod
    def on_meta(cls, shape: torch.Size) -> Store:
        """As `pack` of a matrix of this shape, on the meta device: sizes without numbers."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) as a new dense tensor."""
        raise NotImplementedError

    def operand(self) -> Packed | None:
        """The matrix as the kernel for products of a few rows reads it; None where it cannot."""
        return None

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) -> x W^T (..., out) in x.dtype, outside autograd."""
        if (packed := self.operand()) is not None and products.few(x, packed.weight):
            return products.product(x, packed)
        return self.ways.linear(x, self.unpack(x.dtype))

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> x W^T (..., out) in x.dtype. A dense matrix lives only while the product runs."""
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.rwkv_rlhf.packed_product(x, *self.as_arguments())
            return found
        y: Tensor = _PackedProduct.apply(x, self)
        return y

    def as_arguments(self) -> tuple[str, str, list[Tensor], list[int]]:
        """What an operator of layers/stores/in_graph.py makes the same store from."""
        return self.mode, " ".join(self._buffers), [x for x in self._buffers.values() if x is not None], [*self.shape]

    def bytes(self) -> int:
        """Bytes that the packed matrix takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class _PackedProduct(torch.autograd.Function):
    """x W^T with W unpacked in forward and once more in backward, so that autograd keeps no dense copy alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: Store) -> Tensor:
        ctx.store = store
        return store.product(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.store.ways.input_gradient(upstream, ctx.store.unpack(upstream.dtype)), None
