"""Four-bit blocks by bitsandbytes: the two functions that pack and unpack, nothing of its layers.

Legend: n number of elements of the matrix, blocks n / 64 rounded up.
"""

from __future__ import annotations

import logging
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
CHUNK = 1 << 20  # elements packed at once: quantize_4bit holds several float32 copies of what it is given


def _bitsandbytes() -> ModuleType:
    # its import warns about an optional product kernel that is not used here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            f"4-bit storage needs bitsandbytes ({error}): pip install bitsandbytes==0.50.2, or pass --quant 0"
        ) from error
    return functional


def pack_4bit(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """(out, in) of any float dtype -> packed (32 blocks, 1) uint8 and absmax (blocks,) float32, mode "nf4" or "fp4".

    The matrix is read as one row of n numbers cut into blocks of 64, as the QLoRA authors do; the last block is filled
    with zeros. Values are taken in float32, so a matrix packs the same from every dtype that holds it exactly. Raises
    ValueError with the pip line when bitsandbytes is missing.
    """
    functional = _bitsandbytes()
    flat = weight.detach().contiguous().view(-1)
    blocks = math.ceil(flat.numel() / BLOCK)
    packed = torch.empty((blocks * BLOCK // 2, 1), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK].float()
        part = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        rows, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=mode)
        first = begin // BLOCK
        packed[first * BLOCK // 2 : (first + len(part)) * BLOCK // 2] = rows
        absmax[first : first + len(part)] = state.absmax
    return packed, absmax


def unpack_4bit(packed: Tensor, absmax: Tensor, shape: torch.Size, mode: str, dtype: torch.dtype) -> Tensor:
    """The inverse: a dense tensor of `shape` in `dtype` (float64 by way of float32)."""
    functional = _bitsandbytes()
    direct = torch.float32 if dtype == torch.float64 else dtype
    # One block a row: its CPU kernel restarts the blocks at each row and is wrong for rows that are not whole blocks.
    rows = torch.Size((absmax.numel(), BLOCK))
    state = functional.QuantState(absmax=absmax, shape=rows, blocksize=BLOCK, quant_type=mode, dtype=direct)
    dense = functional.dequantize_4bit(packed, state)
    return dense.view(-1)[: shape.numel()].view(shape).to(dtype)
