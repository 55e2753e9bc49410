"""Whole steps with and without `--compile 1`: CPU seconds a step, seconds of compiling, and how far the steps differ.

    python benchmarks/compiled.py [--versions x070 x060] [--layers 2] [--width 768] [--tokens 512] [--precision fp32]

A step is forward and backward of a fresh model over one row; those of both kinds take turns. On the GPU where there is
one, and wall seconds then.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.precision import DTYPES

VOCABULARY, HEAD = 256, 64


def model_of(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> RWKV:
    """A model with float32 masters."""
    model = RWKV(sizes_of(tensors), compute_dtype=dtype)
    model.load_state_dict({name: x for name, x in tensors.items() if name in model.state_dict()})
    return model.to(device)


def step(model: RWKV, tokens: Tensor) -> Tensor:
    """The gradient of all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    hidden, _ = model(tokens, keep_state=False)
    hidden.float().square().mean().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def timed(model: RWKV, tokens: Tensor, device: str) -> tuple[float, Tensor]:
    """Seconds of a step, of all cores on a CPU, and what it gives."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    found = step(model, tokens)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began, found


def main() -> None:
    """Print one Markdown row a version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=["x070", "x060"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| version | plain s | compiled s | gain | compiling s | gradients differ by |\n|---|---|---|---|---|---|")
    for version in args.versions:
        tensors = initial_tensors(version, args.layers, args.width, VOCABULARY, HEAD, 1)
        plain, compiled = (model_of(tensors, DTYPES[args.precision], device) for _ in range(2))
        compiled.compile_blocks()
        row = torch.randint(VOCABULARY, (1, args.tokens), device=device)
        wanted = step(plain, row)
        first, found = timed(compiled, row, device)
        off = float((found - wanted).norm() / wanted.norm())
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.turns):
            for model, list_ in zip((plain, compiled), times, strict=True):
                list_.append(timed(model, row, device)[0])
        a, b = map(statistics.median, times)
        print(f"| {version} | {a:.3f} | {b:.3f} | {a / b - 1:+.1%} | {first - b:.0f} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
