"""Four-bit blocks by bitsandbytes: its two functions that pack and unpack, nothing of its layers.

Legend: n number of elements of the matrix, blocks n / 64 rounded up.
"""

from __future__ import annotations

import functools
import logging
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.layers.stores.store import Store
from rwkv_rlhf.ops.products import BLOCK, Packed

BINS = 1024  # cells of [-1, 1] in which at most one border between two levels lies
CHUNK = 1 << 20  # elements packed at once: quantize_4bit holds several float32 copies of what it is given


def _bitsandbytes() -> ModuleType:
    # its import warns about an optional product kernel that is not used here; setting a level again takes a millisecond
    if (logger := logging.getLogger("bitsandbytes")).level != logging.ERROR:
        logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            f"4-bit storage needs bitsandbytes ({error}): pip install bitsandbytes==0.50.2, or pass --quant 0"
        ) from error
    return functional


def _pack_on_cpu(part: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """(blocks, 64) float32 -> (32 blocks, 1) uint8 and (blocks,): bit for bit what `quantize_4bit` gives on a CPU.

    It searches the level of each value among 15 borders, which takes most of its time. Here a table tells for the cell
    of [-1, 1] that holds the value how many borders lie below, and one comparison is left, with the border in the cell.
    """
    levels, borders, order = _tables(mode)
    largest = part.abs().amax(1)
    values = torch.clamp(part * (1.0 / largest.clamp(min=1e-38)).view(-1, 1), -1, 1).view(-1)
    cells = _cells(values)
    count = levels.index_select(0, cells).add_(values > borders.index_select(0, cells))
    codes = count if mode == "nf4" else order.index_select(0, count.int())
    pairs = codes.view(-1, 2)
    return pairs[:, :1] << 4 | pairs[:, 1:], largest


def _cells(values: Tensor) -> Tensor:
    # rising values never fall back a cell; NaN goes to some cell instead of out of the table
    return ((values + 1) * (BINS / 2)).int().clamp_(0, BINS - 1)


@functools.cache
def _tables(mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell: how many borders lie below it (uint8), and the border in it or infinity; the codes by level."""
    code = _bitsandbytes().get_4bit_type(mode, device="cpu")
    order = torch.argsort(code)
    middle = (code[order[:-1]] + code[order[1:]]) / 2
    cells = _cells(middle)
    assert len(set(cells.tolist())) == len(cells)
    levels = (cells.view(1, -1) < torch.arange(BINS).view(-1, 1)).sum(1).to(torch.uint8)
    borders = torch.full((BINS,), math.inf).index_copy_(0, cells.long(), middle)
    return levels, borders, order.to(torch.uint8)


@functools.cache
def _levels(mode: str) -> Tensor:
    """What the 16 codes stand for, float32."""
    found: Tensor = _bitsandbytes().get_4bit_type(mode, device="cpu").float()
    return found


class FourBit(Store):
    """Blocks of 64 values with one float32 scale each, in the 16 levels that `mode` names (arXiv 2305.14314)."""

    packed: Tensor  # (32 blocks, 1) uint8
    absmax: Tensor  # (blocks,) float32

    @classmethod
    def pack(cls, weight: Tensor) -> FourBit:
        """The matrix is read as one row of n numbers cut into blocks of 64, as the QLoRA authors do.

        The last block is filled with zeros. Values are taken in float32, so a matrix packs the same from every dtype
        that holds it exactly. Raises ValueError with the pip line when bitsandbytes is missing.
        """
        functional = _bitsandbytes()
        flat = weight.detach().contiguous().view(-1)
        blocks = math.ceil(flat.numel() / BLOCK)
        packed = torch.empty((blocks * BLOCK // 2, 1), dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
        for begin in range(0, flat.numel(), CHUNK):
            part = flat[begin : begin + CHUNK].float()
            part = F.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
            first = begin // BLOCK
            if part.device.type == "cpu":
                rows, largest = _pack_on_cpu(part, cls.mode)
            else:
                rows, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type=cls.mode)
                largest = state.absmax
            packed[first * BLOCK // 2 : (first + len(part)) * BLOCK // 2] = rows
            absmax[first : first + len(part)] = largest
        return cls(weight.shape, packed=packed, absmax=absmax)

    @classmethod
    def on_meta(cls, shape: torch.Size) -> FourBit:
        blocks = math.ceil(shape.numel() / BLOCK)
        packed = torch.empty((blocks * BLOCK // 2, 1), dtype=torch.uint8, device="meta")
        return cls(shape, packed=packed, absmax=torch.empty(blocks, dtype=torch.float32, device="meta"))

    def operand(self) -> Packed | None:
        fits = self.packed.is_cpu and self.shape[1] % BLOCK == 0
        return Packed(self.packed, self.absmax, _levels(self.mode)) if fits else None

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        functional = _bitsandbytes()
        direct = torch.float32 if dtype == torch.float64 else dtype
        # One block a row: its CPU kernel restarts blocks at each row and is wrong for rows that are not whole blocks.
        rows = torch.Size((self.absmax.numel(), BLOCK))
        state = functional.QuantState(
            absmax=self.absmax, shape=rows, blocksize=BLOCK, quant_type=self.mode, dtype=direct
        )
        dense: Tensor = functional.dequantize_4bit(self.packed, state)
        return dense.view(-1)[: self.shape.numel()].view(self.shape).to(dtype)


class NF4(FourBit):
    """Levels at the quantiles of a normal distribution."""

    mode = "nf4"


class FP4(FourBit):
    """Levels of a 4-bit float: sign, two bits of exponent, one of mantissa."""

    mode = "fp4"
