"""How a frozen matrix is kept in memory. A store packs a matrix and gives it back; it knows nothing of adapters.

A new storage is one file with a `Store` subclass and one line in `STORES`.
Legend: n number of elements of the matrix, blocks n / 64 rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.layers.nf4 import pack_4bit, unpack_4bit


class Store(nn.Module):
    """A packed matrix of shape (out, in). Its tensors are buffers outside the state dict: `.to(device)` moves them."""

    mode = ""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    @classmethod
    def pack(cls, weight: Tensor) -> Store:
        """Pack a dense (out, in) matrix on the device where it lies."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) as a new dense tensor."""
        raise NotImplementedError

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> x W^T (..., out) in x.dtype. The dense matrix lives only while the product runs."""
        return _PackedProduct.apply(x, self)

    def _apply(self, fn, recurse: bool = True):
        """Follow moves between devices but no casts: block scales in bfloat16 would be another matrix."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class _PackedProduct(torch.autograd.Function):
    """x W^T with W unpacked in forward and once more in backward, so that autograd keeps no dense copy alive."""

    @staticmethod
    def forward(ctx, x: Tensor, store: Store) -> Tensor:
        ctx.store = store
        return nn.functional.linear(x, store.unpack(x.dtype))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return upstream @ ctx.store.unpack(upstream.dtype), None


class FourBit(Store):
    """Blocks of 64 values with one float32 scale each, in the 16 levels that `mode` names (arXiv 2305.14314)."""

    def __init__(self, shape: torch.Size, packed: Tensor, absmax: Tensor) -> None:
        super().__init__(shape)
        self.register_buffer("packed", packed, persistent=False)  # (32 blocks, 1) uint8
        self.register_buffer("absmax", absmax, persistent=False)  # (blocks,) float32

    @classmethod
    def pack(cls, weight: Tensor) -> FourBit:
        return cls(weight.shape, *pack_4bit(weight, cls.mode))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return unpack_4bit(self.packed, self.absmax, self.shape, self.mode, dtype)


class NF4(FourBit):
    """Levels at the quantiles of a normal distribution."""

    mode = "nf4"


class FP4(FourBit):
    """Levels of a 4-bit float: sign, two bits of exponent, one of mantissa."""

    mode = "fp4"


# "none" keeps the matrix dense, as a parameter of its layer
STORES: dict[str, type[Store] | None] = {"none": None, "nf4": NF4, "fp4": FP4}


def store_class(mode: str) -> type[Store] | None:
    """The store of `--quant_mode`. Raises ValueError with the legal modes."""
    if mode not in STORES:
        raise ValueError(f"--quant_mode {mode}: the storages of this program are {', '.join(STORES)}")
    return STORES[mode]
