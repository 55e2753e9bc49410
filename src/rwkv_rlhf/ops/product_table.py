"""Which way of ops/product_ways.py is the fastest on this machine, for each precision, product and class of rows.

Processors that were measured are in KNOWN, so that machines of one kind compute alike; any other is measured once, in
less than three seconds, and what was found is kept beside the kernels.
"""

from __future__ import annotations

import functools
import math
import platform
import re
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rwkv_rlhf.ops.build import cache_folder
from rwkv_rlhf.ops.cpu import CPU_INFO
from rwkv_rlhf.ops.product_ways import CLASSES, ONEDNN, PLAIN, PRODUCTS, TORCH, WAYS, Ways, matters, refusal
from rwkv_rlhf.ops.timing import kept, one_thread
from rwkv_rlhf.precision import NAMES

KEPT = "product_ways.json"  # machine and precision -> product -> class -> way -> seconds
SHAPE = (1536, 768)  # outputs and inputs of the matrix that is timed
ROWS = (1, 3, 12, 48, 192, 512)  # of each class
ADVANTAGE = 1.1  # times as fast, from which another way than PyTorch's own is taken
REPEATS = 6
ENOUGH = 0.05  # seconds in which a way is timed again, for one class
ALL = 2.5  # seconds after which what was not timed stays PyTorch's
Seconds = dict[str, dict[str, dict[str, float]]]  # product -> class -> way

# processor -> precision -> ways; where it says nothing, PyTorch's own
KNOWN: dict[str, dict[torch.dtype, Ways]] = {
    "GenuineIntel 6 207": {  # Emerald Rapids, AVX-512 and AMX: 2026-11-27, PyTorch 2.13.0
        torch.float32: Ways(output=(TORCH, TORCH, ONEDNN, TORCH, TORCH, TORCH)),
        torch.bfloat16: Ways(weight=(TORCH, TORCH, ONEDNN, ONEDNN, ONEDNN, TORCH)),
    }
}


def ways_for(dtype: torch.dtype, width: int) -> Ways:
    """The fastest ways of this machine for a model of this width in `dtype`, by KNOWN or by what is measured once."""
    if not matters(dtype, width) or all(refusal(way, dtype) for way in WAYS if way != TORCH):
        return PLAIN
    known = KNOWN.get(processor())
    return (fastest(kept_seconds(dtype)) if known is None else known.get(dtype, PLAIN)).possible(dtype)


def fastest(seconds: Seconds) -> Ways:
    """The ways that were timed as the fastest; PyTorch's own where nothing is a tenth faster."""
    rows = {}
    for product in PRODUCTS:
        row = []
        for name in CLASSES:
            times = seconds.get(product, {}).get(name, {})
            best = min(times, key=lambda way: times[way], default=TORCH)
            row.append(best if TORCH in times and times[best] * ADVANTAGE < times[TORCH] else TORCH)
        rows[product] = tuple(row)
    return Ways(**rows)


@functools.cache
def processor() -> str:
    """The processor by its maker, family and model, as Linux numbers them; elsewhere by what the system calls it."""
    try:
        text = CPU_INFO.read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = [re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return " ".join(one[1] for one in found if one) or platform.machine()


def machine() -> str:
    """What the measured times belong to: processor, instructions and PyTorch."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def kept_seconds(dtype: torch.dtype, measure: Callable[[torch.dtype], Seconds] | None = None) -> Seconds:
    """Seconds of each way on this machine, measured the first time that somebody asks."""
    return kept(cache_folder, KEPT, f"{machine()}, {NAMES[dtype]}", checked, lambda: (measure or measured)(dtype))


def checked(found: Seconds) -> Seconds:
    """What was kept. Raises TypeError, ValueError or AttributeError where it has another form."""
    fastest(found)
    return found


def measured(dtype: torch.dtype) -> Seconds:
    """The best time of each way that can be taken, in seconds of one core; the ways take turns. What there was no time
    for is not there.

    By that core's own clock: others may be busy.
    """
    end = time.perf_counter() + ALL
    with one_thread():
        return _measured(dtype, end)


def _measured(dtype: torch.dtype, end: float) -> Seconds:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SHAPE, generator=generator).to(dtype)
    ways = [way for way in WAYS if not refusal(way, dtype)]
    found: Seconds = {product: {} for product in PRODUCTS}
    for name, rows in reversed(list(zip(CLASSES, ROWS, strict=True))):  # the largest gain first
        x, g = (torch.randn(rows, n, generator=generator).to(dtype) for n in reversed(SHAPE))
        for product, (a, b) in {"output": (x, weight), "input": (g, weight.t()), "weight": (g.t(), x.t())}.items():
            if time.perf_counter() > end:
                return found
            found[product][name] = _turns(ways, a, b)
    return found


def figures_of(seconds: Seconds, ways: Ways) -> Iterator[tuple[str, str]]:
    """For each product what every way reached, in GFLOP/s of one core, the one that is taken first."""
    operations = 2 * math.prod(SHAPE)
    for product in PRODUCTS:
        parts = []
        for name, rows, taken in zip(CLASSES, ROWS, getattr(ways, product), strict=True):
            times = seconds.get(product, {}).get(name, {})
            rates = [f"{way} {rows * operations / times[way] / 1e9:.0f}" for way in sorted(times, key=taken.__ne__)]
            parts.append(f"{name} {', '.join(rates) or taken}")
        yield f"{product} (GFLOP/s of one core)", "; ".join(parts)


def _turns(ways: list[str], a: Tensor, b: Tensor) -> dict[str, float]:
    best, spent = dict.fromkeys(ways, float("inf")), 0.0
    for turn in range(REPEATS + 1):
        for way in ways:
            begin = time.thread_time()
            WAYS[way](a, b)
            took = time.thread_time() - begin
            spent += took
            if turn:  # the first one warms up
                best[way] = min(best[way], took)
        if turn and spent > ENOUGH:
            break
    return best
