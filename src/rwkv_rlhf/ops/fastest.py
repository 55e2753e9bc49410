"""Which precision this machine computes fastest in: products are timed once, their times kept beside the kernels."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_rlhf.ops.build import cache_folder
from rwkv_rlhf.ops.cpu import instruction_set
from rwkv_rlhf.ops.timing import kept, one_thread
from rwkv_rlhf.precision import DTYPES

KEPT = "products.json"  # machine -> precision -> seconds
SHAPE = (64, 512, 512)  # (M, K) by (K, N)
CPU_SIZES, GPU_SIZES = (128, 512), (4096,)  # rows and columns of products whose rate is measured
REPEATS = 5
LONG_ENOUGH = 0.1  # seconds of a product's repeats, after which its rate is known well enough
SLOW = 4.0  # times as slow as float32: too slow to measure more of it
SLOWER = 1.2  # times as slow as float32, from which a typed precision is worth a sentence


def product_seconds(name: str) -> float:
    """The best time of one product in the precision `name` on one core, as forward and backward make it, in seconds."""
    m, k, n = SHAPE
    x, w = torch.ones(m, k, dtype=DTYPES[name]), torch.ones(n, k, dtype=DTYPES[name])

    def once() -> float:
        begin = time.perf_counter()
        (x @ w.T) @ w
        return time.perf_counter() - begin

    with one_thread():
        return min(once() for _ in range(REPEATS))


def kept_seconds(measure: Callable[[str], float] = product_seconds) -> dict[str, float]:
    """Seconds of a product in bf16 and in fp32 on this machine's CPU, measured the first time that somebody asks."""
    machine = f"{platform.node()} {instruction_set()} {torch.__version__}"
    names = "bf16", "fp32"
    return kept(
        cache_folder,
        KEPT,
        machine,
        lambda found: {name: float(found[name]) for name in names},
        lambda: {name: measure(name) for name in names},
    )


def fastest_precision(device: str) -> str:
    """bf16 or fp32: what "cuda" or "cpu" computes in fastest."""
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    seconds = kept_seconds()
    return "bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"


def slowness(precision: str, device: str) -> float:
    """How many times as long a product in `precision` takes as in float32; 1 where that is not known."""
    if device == "cpu" and precision == "bf16":
        seconds = kept_seconds()
        return seconds["bf16"] / seconds["fp32"]
    return 1.0


def product_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations a second of products in `precision`, on all cores or on the GPU.

    The first product of a size warms up; a larger size is timed only where it does not take long."""
    rate = 0.0
    for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        if rate and 2 * size**3 / rate > LONG_ENOUGH:  # 16-bit products without instructions for them
            break
        x = torch.ones(size, size, dtype=DTYPES[precision], device=device)
        product_time(x)
        best, spent = product_time(x), 0.0
        for _ in range(REPEATS):
            spent += (took := product_time(x))
            best = min(best, took)
            if spent > LONG_ENOUGH:
                break
        rate = 2 * size**3 / best
    return rate


def product_time(x: Tensor) -> float:
    """Seconds of x @ x, until its result is there."""
    begin = time.perf_counter()
    (x @ x)[0, 0].item()
    return time.perf_counter() - begin
