"""Time the recurrence kernels: python benchmarks/kernels.py [--large] [--json PATH]

Prints a Markdown table. Best and median of several runs after warm-up; on a shared machine only the best says anything
about the kernel. Processor ms is the best processor time of forward and backward over all threads: with --threads 1 it
hardly feels other programs, with more it counts waiting threads too. GFLOP/s counts the textbook recurrence (9
floating-point operations per state element and token forward, 26 more backward), whatever an implementation really
executes; its share is of a float32 matrix product of the same torch on the same threads, timed in the same run. "Kept"
is what autograd holds between forward and backward besides the six inputs, per token and channel. Errors are
RMS(difference) / RMS(reference) against the plain loop, the largest of y's and the six gradients'.

B batch, T tokens, H heads, N head size, C = H * N channels, L tokens per chunk
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.ops.build import instruction_set
from src.ops.select import BACKENDS
from src.ops.wkv7 import wkv7

FORWARD_FLOPS, BACKWARD_FLOPS = 9, 26  # per state element and token
Run = Callable[..., tuple[Tensor, Tensor]]


def chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """WKV-7 from zero states in matrix products over chunks of `length` tokens (T a multiple of it): the WY form.

    With g the cumulative log decay in a chunk and e that of the token before: sa of a chunk is u = U0 + W S^T, where
    (I - Aab) [U0, W] = [Aak v, a e^e]; A.. are the masked products of r or a with k or b, decayed in between.
    """
    batch, tokens, heads, size = r.shape

    def split(x: Tensor) -> Tensor:  # (B, T, H, N) -> (B, H, chunks, L, N)
        return x.view(batch, tokens // length, length, heads, size).permute(0, 3, 1, 2, 4)

    r, w, k, v, a, b = map(split, (r, w, k, v, a, b))
    log_decay = -math.exp(-0.5) * torch.sigmoid(w)
    g = log_decay.cumsum(-2)
    end = g[..., -1:, :]
    r_in, a_in = r * g.exp(), a * (g - log_decay).exp()
    k_out, b_out = k * (-g).exp(), b * (-g).exp()
    k_end, b_end = k * (end - g).exp(), b * (end - g).exp()
    A_qk, A_qb = (r_in @ k_out.mT).tril(), (r_in @ b_out.mT).tril()
    A_ak, A_ab = (a_in @ k_out.mT).tril(-1), (a_in @ b_out.mT).tril(-1)
    eye = torch.eye(length, dtype=r.dtype)
    solved = torch.linalg.solve_triangular(eye - A_ab, torch.cat([A_ak @ v, a_in], -1), upper=False)
    U0, W = solved.split(size, dim=-1)
    local, decay = A_qk @ v, end.exp()
    state = r.new_zeros(batch, heads, size, size)  # (B, H, N_v, N_k)
    ys = []
    for c in range(tokens // length):
        u = U0[:, :, c] + W[:, :, c] @ state.mT
        ys.append(r_in[:, :, c] @ state.mT + local[:, :, c] + A_qb[:, :, c] @ u)
        state = state * decay[:, :, c] + v[:, :, c].mT @ k_end[:, :, c] + u.mT @ b_end[:, :, c]
    return torch.stack(ys, 2).permute(0, 2, 3, 1, 4).reshape(batch, tokens, heads, size), state


def make_inputs(batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs in the ranges of a trained model."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(batch, tokens, heads, size, generator=generator) for _ in range(6)]
    kk = torch.nn.functional.normalize(x[4], dim=-1)
    parts = (x[0] * 0.5, x[1] * 2, x[2] * 0.3, x[3], -kk, kk * torch.sigmoid(x[5]))
    return [part.to(dtype).requires_grad_() for part in parts]


def bytes_kept(run: Run, inputs: list[Tensor]) -> float:
    """Bytes that autograd saves per element of one input, the inputs themselves left out."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y, _ = run(*inputs)
    held = sum(kept.values()) / inputs[0].numel()
    del y
    return held


def measure(run: Run, inputs: list[Tensor], dy: Tensor, repeats: int, seconds: float) -> dict:
    """Times in ms of forward and of forward + backward, and the results of the last run."""
    forward, both, processor = [], [], []
    began = time.perf_counter()
    while len(both) < 2 or (len(both) < repeats and time.perf_counter() - began < seconds):
        start, start_processor = time.perf_counter(), time.process_time()
        y, _ = run(*inputs)
        middle = time.perf_counter()
        grads = torch.autograd.grad(y, inputs, dy)
        forward.append((middle - start) * 1e3)
        both.append((time.perf_counter() - start) * 1e3)
        processor.append((time.process_time() - start_processor) * 1e3)
    return {
        "forward_ms": min(forward),
        "forward_median_ms": statistics.median(forward),
        "both_ms": min(both),
        "both_median_ms": statistics.median(both),
        "processor_ms": min(processor),
        "runs": len(both),
        "kept_bytes": bytes_kept(run, inputs),
        "results": [y.detach(), *grads],
    }


def gemm_gflops(size: int = 1536, seconds: float = 2.0) -> float:
    """Best float32 rate of a square matrix product."""
    a = torch.randn(size, size)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best


def error(results: list[Tensor], references: list[Tensor]) -> float:
    """The largest relative RMS difference of y and the six gradients."""
    pairs = [(x.double(), y.double()) for x, y in zip(results, references, strict=True)]
    return max(float((x - y).square().mean().sqrt() / y.square().mean().sqrt()) for x, y in pairs)


def bench(shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int, seconds: float) -> list[dict]:
    """One row per implementation for one shape (B, T, H, N); the plain loop last, as it is the slowest."""
    inputs = make_inputs(*shape, dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    runs: dict[str, Run] = {}
    for name in BACKENDS["wkv7"]:
        runs[name] = lambda *x, name=name: wkv7(*x, backend=name)
    if dtype == torch.float32 and shape[1] % 32 == 0:
        runs["chunked PyTorch, L=32"] = lambda *x: chunked(*x, length=32)
    loop = runs.pop("naive")
    rows = [{"name": name, **measure(run, inputs, dy, repeats, seconds)} for name, run in runs.items()]
    rows.append({"name": "naive", **measure(loop, inputs, dy, 3, 20.0)})
    elements = math.prod(shape) * shape[-1]
    for row in rows:
        row["shape"], row["dtype"] = shape, str(dtype).removeprefix("torch.")
        row["gflops"] = elements * (FORWARD_FLOPS + BACKWARD_FLOPS) / row["both_ms"] * 1e-6
        row["speedup"] = rows[-1]["both_ms"] / row["both_ms"]
        row["error"] = error(row["results"], rows[-1]["results"])
    for row in rows:
        del row["results"]
    return rows


def table(rows: list[dict], gemm: float) -> str:
    """The rows in Markdown."""
    lines = [
        "| shape | dtype | backend | forward ms: best (median) | forward + backward ms: best (median)"
        " | processor ms | GFLOP/s | share of GEMM | times the loop | kept B per token-channel | error |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        shape = " ".join(f"{letter}{n}" for letter, n in zip("BTHN", row["shape"], strict=True))
        lines.append(
            f"| {shape} | {row['dtype']} | {row['name']} | {row['forward_ms']:.2f} ({row['forward_median_ms']:.2f})"
            f" | {row['both_ms']:.2f} ({row['both_median_ms']:.2f}) | {row['processor_ms']:.1f} | {row['gflops']:.0f}"
            f" | {row['gflops'] / gemm:.0%} | {row['speedup']:.1f} | {row['kept_bytes']:.1f} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the WKV-7 kernels.")
    parser.add_argument("--large", action="store_true", help="also B1 T4096 H32 N64 (the loop then holds 2.5 GB)")
    parser.add_argument("--bf16", action="store_true", help="also bfloat16 inputs")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"), default=(1, 1024, 12, 64))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=200, help="at most so many runs of one implementation")
    parser.add_argument("--seconds", type=float, default=8.0, help="and no longer than this")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(args.shape)] + ([(1, 4096, 32, 64)] if args.large else [])
    rows = []
    for dtype in (torch.float32, torch.bfloat16)[: 1 + args.bf16]:
        for shape in shapes:
            rows += bench(shape, dtype, args.repeats, args.seconds)
    gemm = gemm_gflops()
    machine = f"{platform.machine()} {instruction_set()}, {args.threads} threads, torch {torch.__version__}"
    print(f"{machine}; float32 matrix product: {gemm:.0f} GFLOP/s\n\n{table(rows, gemm)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "gemm_gflops": gemm, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
