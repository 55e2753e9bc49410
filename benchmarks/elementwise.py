"""Forward and backward time of the element-wise groups of RWKV-7, plain PyTorch against the C++ kernels.

    python benchmarks/elementwise.py [--tokens 1024] [--width 768] [--head_size 64] [--repeats 30]

Prints a Markdown table: milliseconds per call (lower quartile), with gradients for every input.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.ops import elementwise

Case = tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]


def cases(tokens: int, width: int, size: int, dtype: torch.dtype) -> dict[str, Case]:
    """name -> (function of (backend, *inputs), inputs): small vectors float32, as trained."""
    heads = width // size

    def rows(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *(shape or (width,))).to(dtype).requires_grad_()

    def vector(*shape: int) -> Tensor:
        return torch.randn(*(shape or (width,))).requires_grad_()

    keys = (rows(), vector(), vector(), vector(), rows())
    norm = (rows(heads, size), rows(), rows(), rows(), vector(heads, size), vector(), vector(), rows())
    return {
        "token_mix, 6 mixes": (lambda b, x, m: elementwise.token_mix(x, None, None, m, b), (rows(), vector(6, width))),
        "token_mix, 1 mix": (lambda b, x, m: elementwise.token_mix(x, None, None, m, b), (rows(), vector(1, width))),
        "value_gate": (lambda b, *t: (elementwise.value_gate(*t, backend=b),), (rows(), rows(), vector(), rows())),
        "delta_keys": (lambda b, *t: elementwise.delta_keys(*t, heads, backend=b), keys),
        "gated_norm": (lambda b, *t: (elementwise.gated_norm(*t, backend=b),), norm),
        "relu_squared, 4C": (lambda b, x: (elementwise.relu_squared(x, b),), (rows(4 * width),)),
    }


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Lower quartile: what the call takes when nobody else wants the machine."""
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[repeats // 4] * 1e3


def measure(case: Case, backend: str, repeats: int) -> tuple[float, float]:
    """(forward without gradients, forward and backward)."""
    function, inputs = case
    grads = [torch.randn_like(out) for out in function(backend, *inputs)]

    def forward() -> None:
        with torch.no_grad():
            function(backend, *inputs)

    def both() -> None:
        torch.autograd.grad(function(backend, *inputs), inputs, grads)

    return milliseconds(forward, repeats), milliseconds(both, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    print(f"T {args.tokens}, C {args.width}, N {args.head_size}, {torch.get_num_threads()} threads\n")
    print("| group | dtype | naive fwd | cpu fwd | naive fwd+bwd | cpu fwd+bwd | ratio |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for name, case in cases(args.tokens, args.width, args.head_size, dtype).items():
            slow_fwd, slow = measure(case, "naive", args.repeats)
            fast_fwd, fast = measure(case, "cpu", args.repeats)
            label = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {label} | {slow_fwd:.2f} | {fast_fwd:.2f} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} |"
            )


if __name__ == "__main__":
    main()
