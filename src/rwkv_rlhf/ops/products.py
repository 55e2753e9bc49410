"""Products of a few rows with a matrix, y = x W^T without a gradient: what decoding on a CPU is made of.

`naive` is PyTorch's own product on any device; `cpu` is cuda/cpu/products.cpp, which reads each weight once for all
rows, in the dtype or the integers that it is stored in. A row's result is the same beside any others.

Legend: R rows, K columns (inputs), O outputs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.ops import calls, cpu
from rwkv_rlhf.ops.backends import choose

MOST_ROWS = 16  # from here on PyTorch's product, which works in tiles, has the better of it
BLOCK = 64  # integers of one scale


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
        and weight.dtype in (*calls.DTYPES, torch.int8)
    )


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None, backend: str = "auto") -> Tensor:
    """x (..., K) times weight (O, K), transposed: (..., O) in x's dtype; sums are float32 and rounded once.

    weight: float32 or bfloat16, or with `scale` integers: int8, of which each 64 along a row are multiplied by one
    number of `scale` (O * K / 64, float32). Nothing is differentiable. Raises ValueError where 64 do not divide K.
    """
    inputs, outputs = x.shape[-1], weight.numel() // x.shape[-1]
    if scale is not None and inputs % BLOCK:
        raise ValueError(f"product: blocks of {BLOCK} integers do not fill rows of {inputs}")
    name, _ = choose("products", x.device, x.dtype, tuple(x.shape), backend)
    if name == "naive":
        dense = weight if scale is None else weight.view(-1, BLOCK).float() * scale.view(-1, 1)
        return F.linear(x, dense.view(outputs, inputs).to(x.dtype))
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    stored = calls.DTYPES.get(weight.dtype, 0)
    tensors = [x.float().contiguous(), weight.contiguous(), scale, y]
    cpu.call("products", "rwkv_product", x.dtype, tensors, (x.numel() // inputs, inputs, outputs), stored)
    return y
