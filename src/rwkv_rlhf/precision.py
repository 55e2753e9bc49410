"""Devices and dtypes: what the words of the command line name, how wide a number is, what this machine has."""

from __future__ import annotations

from typing import NamedTuple

import torch

# By the names of --precision.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The precisions of the scripts' --strategy -> what is computed in: bf16 is the 16-bit type that the kernels know.
STRATEGY_PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16"}
STRATEGY_STORES = ("int8", "nf4")  # packed matrices, computed with in fp32 on a CPU and in bf16 on a GPU


class DeviceChoice(NamedTuple):
    """Where a script computes, in what, and how matrices are stored; `notice` is a sentence for the user, "" when
    nothing was changed."""

    device: str
    dtype: torch.dtype
    notice: str = ""
    store: str = "none"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of masters, states and sums beside computation in `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_for(accelerator: str) -> str:
    """`--accelerator` -> "cuda" or "cpu". Raises ValueError when `gpu` was asked for and there is none."""
    found = torch.cuda.is_available()
    if accelerator == "gpu" and not found:
        raise ValueError("--accelerator gpu: no GPU is visible here; use --accelerator auto or cpu")
    return "cuda" if found and accelerator != "cpu" else "cpu"


def parse_strategy(text: str) -> DeviceChoice:
    """The scripts' `--strategy`, 'cuda fp16' and the like.

    Without a GPU `cuda` becomes the CPU, in float32 unless bf16 was asked for: 16-bit products are slow on many CPUs.
    fp16 on a GPU becomes bf16, the 16-bit type that the kernels know. int8 and nf4 pack the matrices. Raises ValueError
    for other words.
    """
    gpu = torch.cuda.is_available()
    words = (("cuda bf16" if gpu else "cpu fp32") if text == "auto" else text).split()
    device, _, number = words[0].partition(":") if words else ("", "", "")
    precision = words[1] if len(words) > 1 else "fp32"
    store = precision if precision in STRATEGY_STORES else "none"
    if store != "none":
        precision = "bf16" if device == "cuda" and gpu else "fp32"
    known = device in ("cuda", "cpu") and precision in STRATEGY_PRECISIONS
    if not known or len(words) > 2 or (number and not number.isdigit()):
        raise ValueError(
            f"--strategy {text!r}: expected auto, or a device (cuda, cpu) and a precision (fp16, bf16, fp32, int8, nf4)"
        )
    if device == "cuda" and not gpu:
        name = "bf16" if precision == "bf16" else "fp32"
        notice = f"--strategy {text!r}: no GPU is visible here, running on the CPU in {name}"
        return DeviceChoice("cpu", DTYPES[name], notice, store)
    if device == "cpu" and precision == "fp16":
        return DeviceChoice("cpu", torch.float32, f"--strategy {text!r}: fp16 is not for CPUs, running in fp32")
    notice = f"--strategy {text!r}: computing in bf16" if precision == "fp16" else ""
    return DeviceChoice(words[0], DTYPES[STRATEGY_PRECISIONS[precision]], notice, store)
