"""Products of a few rows with a matrix, y = x W^T without a gradient: what decoding on a CPU is made of.

`naive` is PyTorch's own product on any device; `cpu` is cuda/cpu/products.cpp, which reads each weight once for all
rows, as it is stored. A row's result is the same beside any others, as long as they are few.

Legend: R rows, K columns (inputs), O outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.ops import calls, cpu
from rwkv_rlhf.ops.backends import choose

MOST_ROWS = 16  # from here on rows lie in panels in the kernel, and layers take PyTorch's product, which works in tiles
BLOCK = 64  # packed weights of one scale
# how a matrix may be stored, by the numbers of cuda/cpu/product_formats.h; uint8: two numbers of four bits
STORED = {**calls.DTYPES, torch.int8: 2, torch.uint8: 3, torch.float8_e4m3fn: 4}


class Packed(NamedTuple):
    """A matrix (O, K) that is not stored as plain numbers; 64 divide K.

    weight: int8 (O * K), or uint8 (O * K / 2) with the first of two numbers in the upper half, each 64 along a row with
    one of `scale` (O * K / 64); or float8_e4m3fn (O, K), each row with one of `scale` (O). All scales are float32.
    levels (16,) float32: what numbers of four bits stand for.
    """

    weight: Tensor
    scale: Tensor
    levels: Tensor | None = None

    def dense(self) -> Tensor:
        """The weights in a row, float32."""
        numbers = self.weight.view(-1)
        if self.levels is not None:
            numbers = self.levels[torch.stack((numbers >> 4, numbers & 15), 1).long()]
        return (numbers.float().view(self.scale.numel(), -1) * self.scale.view(-1, 1)).view(-1)


def few(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes x (B, 1, K) or (R, K) and weight (O, K): one token of each of a few rows, on a CPU.

    Only where no gradient is recorded, and never a row of several tokens: scores without a gradient are those of the
    pass that trains, to the last bit.
    """
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and (x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1))
        and x.dtype in calls.DTYPES
        and weight.dtype in STORED
    )


def product(x: Tensor, weight: Tensor | Packed, backend: str = "auto") -> Tensor:
    """x (..., K) times weight (O, K), transposed: (..., O) in x's dtype; sums are float32 and rounded once.

    weight: float32 or bfloat16, or packed. Nothing is differentiable. Raises ValueError where 64 do not divide K of a
    packed one.
    """
    inputs = x.shape[-1]
    if isinstance(weight, Packed) and inputs % BLOCK:
        raise ValueError(f"product: blocks of {BLOCK} weights do not fill rows of {inputs}")
    name, _ = choose("products", x.device, x.dtype, tuple(x.shape), backend)
    if name == "naive":
        dense = weight.dense() if isinstance(weight, Packed) else weight
        return F.linear(x, dense.view(-1, inputs).to(x.dtype))
    given, scale, levels = weight if isinstance(weight, Packed) else (weight, None, None)
    rows, outputs = x.numel() // inputs, given.numel() * (1 if levels is None else 2) // inputs
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    tensors, sizes = [x.float().contiguous(), given.contiguous(), scale, levels, y], (rows, inputs, outputs)
    cpu.call("products", "rwkv_product", x.dtype, tensors, (*sizes, rows > MOST_ROWS), STORED[given.dtype])
    return y
