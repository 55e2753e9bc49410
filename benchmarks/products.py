"""Products of a few rows with a matrix, as decoding makes them: PyTorch's, oneDNN's with a packed matrix, and ours
for each way of storing one (nf4 where bitsandbytes is installed).

    python benchmarks/products.py [--rows 1 2 4 8 16 32] [--repeats 9] [--json F]

The sides take turns; milliseconds are medians, with the fastest and slowest; GB/s are the weights' bytes by the median.
A machine that reads no faster than its memory is at its limit with one row.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.ops import cpu
from rwkv_rlhf.ops.products import Packed, product

SHAPES = ((65536, 768), (3072, 768), (768, 3072), (768, 768))  # (out, in) of RWKV-7 L12-D768


def packed_by_onednn(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """x -> x W^T by oneDNN's own layout of the matrix; None where this build of torch has no such operators."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return None
    packed = operators._reorder_linear_weight(weight)
    return lambda x: operators._linear_pointwise(x, packed, None, "none", [], "")


def sides(weight: Tensor, rows: int) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """By name: a product of so many rows, and the bytes of the matrix that it reads."""
    x, half, count = torch.randn(rows, weight.shape[1]), weight.bfloat16(), weight.numel()
    found: dict[str, tuple[Callable[[], Tensor], int]] = {
        "torch fp32": (lambda: F.linear(x, weight), 4 * count),
        "torch bf16": (lambda: F.linear(x.bfloat16(), half), 2 * count),
    }
    if (onednn := packed_by_onednn(weight)) is not None:
        found["oneDNN packed fp32"] = (lambda: onednn(x), 4 * count)
    matrices: dict[str, tuple[Tensor | Packed, int]] = {"fp32": (weight, 4 * count), "bf16": (half, 2 * count)}
    for mode in ("int8", "fp8", "nf4"):
        if mode == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        store = STORES[mode].pack(weight)
        if (packed := store.operand()) is not None:
            matrices[mode] = (packed, store.bytes())
    for name, (matrix, size) in matrices.items():
        given = x.bfloat16() if name == "bf16" else x
        found[f"ours {name}"] = (functools.partial(product, given, matrix, "cpu"), size)
    return found


def measured(shape: tuple[int, int], rows: int, repeats: int) -> list[dict[str, object]]:
    """One line for each side."""
    made = sides(torch.randn(shape) / shape[1] ** 0.5, rows)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 1):
        for name, (run, _) in made.items():
            began = time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    return [
        {
            **{"out": shape[0], "in": shape[1], "rows": rows, "side": name},
            **{"ms": statistics.median(times[name]), "best": min(times[name]), "worst": max(times[name])},
            "gb_per_s": made[name][1] / statistics.median(times[name]) / 1e6,
        }
        for name in made
    ]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    flags.add_argument("--repeats", type=int, default=9)
    flags.add_argument("--json", type=Path)
    args = flags.parse_args()
    torch.manual_seed(0)
    print(f"{cpu.instruction_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| out x in | rows | side | ms (fastest - slowest) | GB/s |\n|---|---|---|---|---|")
    lines = []
    for shape in SHAPES:
        for rows in args.rows:
            for line in measured(shape, rows, args.repeats):
                lines.append(line)
                spread = f"{line['ms']:.2f} ({line['best']:.2f} - {line['worst']:.2f})"
                print(f"| {shape[0]} x {shape[1]} | {rows} | {line['side']} | {spread} | {line['gb_per_s']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
