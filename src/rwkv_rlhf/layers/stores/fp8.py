"""Eight-bit floats (e4m3: a sign, four bits of exponent, three of mantissa) with one scale a row.

Legend: n rows of x. Source of the format: arXiv 2209.05433.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from rwkv_rlhf.layers.stores.store import Store, scaled_rows
from rwkv_rlhf.ops.products import BLOCK, Packed

log = logging.getLogger(__name__)

LARGEST = 448.0  # of e4m3fn
FIRST_CAPABILITY = (8, 9)  # of the CUDA devices that multiply e4m3
CHUNK = 1 << 22  # elements packed at once: the float32 copies that packing makes stay small
MULTIPLE = 16  # what their kernels want both sides of the matrix to be a multiple of


def row_scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of any float dtype -> (float8_e4m3fn, scale (rows, 1) float32). Rows of zeros stay zero."""
    wide = matrix.float()
    scale = wide.abs().amax(1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    # the quotient may be a rounding above the largest number, which the cast would turn into NaN
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


@functools.cache
def why_dequantised(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    """Why `torch._scaled_mm` cannot multiply x of `dtype` with an e4m3 matrix of `shape` on `device`; "" if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        reason = f"{device.type} has no fast fp8 product"
    elif (capability := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, FIRST_CAPABILITY))
        reason = f"this GPU has capability {found}, not {needed}"
    elif dtype != torch.bfloat16:
        reason = f"the computation is in {dtype}, not bfloat16"
    elif shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return f"an fp8 matrix of {tuple(shape)} is dequantised: its sides are no multiples of {MULTIPLE}"
    elif refusal := _refusal(device):
        reason = f"this GPU refuses their product ({refusal})"
    else:
        return ""
    return f"fp8 matrices are dequantised for each product: {reason}"


@functools.cache
def _refusal(device: torch.device) -> str:
    """What the libraries say against a small product on `device`; "" when they run it."""
    try:
        rows, scale = row_scaled(torch.ones(MULTIPLE, MULTIPLE, device=device))
        torch._scaled_mm(rows, rows.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@functools.cache
def _say(sentence: str) -> None:
    log.info("%s", sentence)


def chosen_product(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether to multiply natively. The reason is logged, each sentence once."""
    why = why_dequantised(device, dtype, shape)
    _say(why or "fp8 matrices are multiplied natively; inputs are rounded to fp8 with one scale a token")
    return not why


def _small_float16(bits: Tensor) -> Tensor:
    """The bits of e4m3 as int8 -> the numbers times 2^-8 in float16, which is exact.

    PyTorch's cast from fp8 is a scalar loop on a CPU (0.3 Gvalues/s, this 3). Sign and the other seven bits are put
    where float16 has them; its exponent counts from -15 instead of -7, hence 2^-8, also for subnormals.
    """
    return bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


class FP8(Store):
    """Rows of e4m3 with one float32 scale each (largest magnitude / 448).

    Where the hardware can, x is rounded to e4m3 as well, with one scale a token, and multiplied natively: that moves a
    random product by another 2.6 % (RMS). Gradients are those of the dequantised matrix.
    """

    mode = "fp8"
    packed: Tensor  # (out, in) float8_e4m3fn
    scale: Tensor  # (out, 1) float32

    @classmethod
    def pack(cls, weight: Tensor) -> FP8:
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scale = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
        step = max(1, CHUNK // weight.shape[1])
        for begin in range(0, len(weight), step):
            rows = slice(begin, begin + step)
            packed[rows], scale[rows] = row_scaled(weight[rows].detach())
        return cls(weight.shape, packed=packed, scale=scale)

    @classmethod
    def on_meta(cls, shape: torch.Size) -> FP8:
        packed = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return cls(shape, packed=packed, scale=torch.empty((shape[0], 1), dtype=torch.float32, device="meta"))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.packed.device.type != "cpu":
            return scaled_rows(self.packed, self.scale, dtype, lambda rows: rows.to(torch.float16))  # exact
        return scaled_rows(self.packed.view(torch.int8), self.scale * 2.0**8, dtype, _small_float16)

    def product(self, x: Tensor) -> Tensor:
        if x.numel() and chosen_product(x.device, x.dtype, self.shape):
            return self.native(x)
        return super().product(x)

    def operand(self) -> Packed | None:
        return Packed(self.packed, self.scale) if self.shape[1] % BLOCK == 0 else None

    def native(self, x: Tensor) -> Tensor:
        """x (..., in) bfloat16 -> x W^T (..., out) bfloat16 by the hardware's e4m3 product."""
        rows, scale = row_scaled(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(rows, self.packed.t(), scale, self.scale.t(), out_dtype=x.dtype)
        return y.view(*x.shape[:-1], -1)
