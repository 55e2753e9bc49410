"""Whole steps with and without `--compile 1`: CPU seconds a step, seconds of compiling, how far both are from float64.

    python benchmarks/compiled.py [--versions x070 x060] [--layers 2] [--width 768] [--tokens 512] [--precision fp32]

A step is forward and backward of a model without a zero over one row; those of both kinds take turns. On the GPU where
there is one, and wall seconds then. Errors are of the gradients of all parameters as one vector, RMS(difference) /
RMS(reference); the last column is the parameter whose own error grows most by compiling.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.precision import DTYPES

VOCABULARY, HEAD = 256, 64


def tensors_of(version: str, layers: int, width: int) -> dict[str, Tensor]:
    """Initial values and a little noise: a fresh model has matrices of zeros, through which no gradient goes."""
    generator = torch.Generator().manual_seed(2)
    tensors = initial_tensors(version, layers, width, VOCABULARY, HEAD, 1)
    return {name: x + 0.02 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}


def model_of(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> RWKV:
    """A model with float32 masters, or one that is all float64."""
    model = RWKV(sizes_of(tensors), compute_dtype=dtype)
    model.load_state_dict({name: x for name, x in tensors.items() if name in model.state_dict()})
    return model.to(device, torch.promote_types(dtype, torch.float32))


def step(model: RWKV, tokens: Tensor) -> dict[str, Tensor]:
    """The gradients of all parameters, for random numbers as those of the last hidden states.

    The norm of those states would not do as a loss: a LayerNorm's output has the same for every input, so that its
    gradients are what a cancellation leaves.
    """
    model.zero_grad(set_to_none=True)
    hidden, _ = model(tokens, keep_state=False)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    hidden.backward(upstream.to(hidden))
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """RMS(difference) / RMS(reference) over all of them."""
    a, b = (torch.cat([x.flatten() for x in one]) for one in (found, wanted))
    return float((a - b).norm() / b.norm())


def errors(plain: dict[str, Tensor], compiled: dict[str, Tensor], exact: dict[str, Tensor]) -> str:
    """The columns of the table about what the steps give."""
    pairs = ((plain, exact), (compiled, exact), (compiled, plain))
    whole = " | ".join(f"{error(a.values(), b.values()):.1e}" for a, b in pairs)
    own = {
        name: [error([one[name]], [exact[name]]) for one in (plain, compiled)] for name in exact if exact[name].any()
    }
    worst = max(own, key=lambda name: own[name][1] / own[name][0])
    return f"{whole} | {worst} ({own[worst][0]:.1e}, {own[worst][1]:.1e})"


def timed(model: RWKV, tokens: Tensor, device: str) -> tuple[float, dict[str, Tensor]]:
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
    print("| version | plain s | compiled s | gain | compiling s | error plain | compiled | both differ by | worst |")
    print("|---|---|---|---|---|---|---|---|---|")
    for version in args.versions:
        tensors = tensors_of(version, args.layers, args.width)
        plain, compiled = (model_of(tensors, DTYPES[args.precision], device) for _ in range(2))
        compiled.compile_blocks()
        row = torch.randint(VOCABULARY, (1, args.tokens), device=device)
        exact = step(model_of(tensors, torch.float64, device), row)
        wanted = step(plain, row)
        first, found = timed(compiled, row, device)
        off = errors(wanted, found, exact)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.turns):
            for model, list_ in zip((plain, compiled), times, strict=True):
                list_.append(timed(model, row, device)[0])
        a, b = map(statistics.median, times)
        print(f"| {version} | {a:.3f} | {b:.3f} | {a / b - 1:+.1%} | {first - b:.0f} | {off} |", flush=True)


if __name__ == "__main__":
    main()
