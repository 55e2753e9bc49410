"""Time the recurrence kernels: python benchmarks/kernels.py [--op wkv6] [--large] [--json PATH]

Prints a Markdown table. Best and median of several runs after warm-up; on a shared machine only the best says anything
about the kernel. Processor ms is the best processor time of forward and backward over all threads: with --threads 1 it
hardly feels other programs, with more it counts waiting threads too. GFLOP/s counts the textbook recurrence (`FLOPS`),
whatever an implementation really executes; its shares are of the rate of float32 multiply-adds in the registers of the
same threads and of a float32 matrix product, both timed in the same run. "Kept" is what autograd holds between forward
and backward besides the inputs, per token and channel. The error is RMS(difference) / RMS(reference) against the plain
loop in float64, the largest of y's and of all gradients'.

B batch, T tokens, H heads, N head size
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from chunked import CHUNKED, LENGTH
from peers import load_peers
from rates import fma_gflops, gemm_gflops

from rwkv_rlhf.ops import recurrence
from rwkv_rlhf.ops.backends import backends_of, choose
from rwkv_rlhf.ops.cpu import instruction_set
from rwkv_rlhf.ops.judge import RECURRENCES, error, make_inputs

# Floating-point operations forward and backward, for each state element and token (wkv4: channel and token; an
# exponential, a maximum or a division is one). Of two for a multiply-add:
#   wkv4  8 for y's weights, 6 for y, 6 + 5 for the state; backward the same again, then 23
#   wkv5, wkv6  2 for y, 3 for the state; backward 3 for the state again, 3 for its gradient, 2 each for dr, dk, dv, dw
#   wkv7  2 for sa, 5 for the state, 2 for y; backward 7 + 4 for both again, 2 each for seven sums, 1 for the decay
FLOPS = {"wkv4": (25, 48), "wkv5": (5, 14), "wkv6": (5, 14), "wkv7": (9, 26)}
PERIOD = 1024  # tokens whose inputs differ
LOOP_BYTES = 12e9  # the plain loop is left out where what it holds for backward would be more
Run = Callable[..., Tensor]
Shape = tuple[int, int, int, int]


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
        y = run(*inputs)
    held = sum(kept.values()) / inputs[0].numel()
    del y
    return held


def measure(run: Run, inputs: list[Tensor], dy: Tensor, repeats: int, seconds: float) -> dict:
    """Times in ms of forward and of forward + backward, and the results of the last run."""
    forward, both, processor = [], [], []
    wait = torch.cuda.synchronize if dy.is_cuda else lambda: None
    began = time.perf_counter()
    while len(both) < 2 or (len(both) < repeats and time.perf_counter() - began < seconds):
        wait()
        start, start_processor = time.perf_counter(), time.process_time()
        y = run(*inputs)
        wait()
        middle = time.perf_counter()
        grads = torch.autograd.grad(y, inputs, dy)
        wait()
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


def inputs_of(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`judge.make_inputs`, whose numbers come from the processor (minutes for a large shape): PERIOD tokens of one row,
    over and over."""
    batch, tokens, *head = shape
    period = PERIOD if tokens % PERIOD == 0 else tokens
    some = (x.detach() for x in make_inputs(op, (1, period, *head), dtype, device))
    count = len(RECURRENCES[op].tokens)
    return [
        (x.repeat(batch, tokens // period, *[1] * (x.dim() - 2)) if i < count else x).requires_grad_()
        for i, x in enumerate(some)
    ]


def runs_of(op: str, inputs: list[Tensor], peers: dict) -> dict[str, tuple]:
    """name -> (inputs, run), ours first: what can run these, without the plain loop."""
    x = inputs[0]
    runs: dict[str, tuple[list[Tensor], Run]] = {}
    for name in backends_of(op):
        try:
            choose(op, x.device, x.dtype, tuple(x.shape), name)
        except ValueError:
            continue
        if name != "naive":
            runs[name] = inputs, lambda *x, name=name: RECURRENCES[op].function(*x, backend=name)[0]
        if name == "triton" and in_pieces(op, x):
            runs["triton, whole rows"] = inputs, partial(whole_rows, op)
    if x.dtype == torch.float32 and x.shape[1] % LENGTH == 0:
        name, chunked = CHUNKED[op]
        runs[name] = inputs, chunked
    for name, (prepare, run) in peers.get(op, {}).items():
        runs[name] = prepare(inputs), run
    return runs


def in_pieces(op: str, x: Tensor) -> bool:
    """Whether Triton's kernels cut the rows of a per-token input into pieces that run side by side."""
    from rwkv_rlhf.ops.triton.launch import processors
    from rwkv_rlhf.ops.triton.recurrences import piece_length

    return op != "wkv4" and piece_length([x.shape[1]] * len(x), x.shape[2], processors(x.device)) > 0


def whole_rows(op: str, *inputs: Tensor) -> Tensor:
    """y of Triton's kernels without pieces: what they are timed beside."""
    from rwkv_rlhf.ops.triton.recurrences import MatrixKernel

    with patch.object(recurrence, "kernel", lambda op, *_: MatrixKernel(op, length=0)):
        return RECURRENCES[op].function(*inputs, backend="triton")[0]


def bench(
    op: str, shape: Shape, dtype: torch.dtype, device: torch.device, peers: dict, limits: tuple[int, float]
) -> list[dict]:
    """One row per implementation for one shape (B, T, H, N); the plain loop last, as it is the slowest."""
    elements = math.prod(shape) * (shape[-1] if op != "wkv4" else 1)
    rows = []
    first = inputs_of(op, shape, dtype, device)
    dy = torch.randn(first[0].shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    runs, held = (
        runs_of(op, first, peers),
        elements * (16 if op != "wkv4" else 100),
    )  # four float32 of each state element
    if held < LOOP_BYTES:
        runs["naive"] = first, lambda *x: RECURRENCES[op].function(*x, backend="naive")[0]
    for name, (inputs, run) in runs.items():
        try:
            rows.append({"name": name, **measure(run, inputs, dy, *(limits if name != "naive" else (3, 20.0)))})
        except (RuntimeError, ValueError, AssertionError) as failure:  # a peer's own words for what it cannot do
            print(f"{op} {shape} {name}: {str(failure).strip().partition(chr(10))[0]}", file=sys.stderr)
    references = None
    if 2 * held < LOOP_BYTES:
        exact = [x.detach().double().requires_grad_() for x in first]
        y = runs["naive"][1](*exact)
        references = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    for row in rows:
        row["op"], row["shape"], row["dtype"] = op, shape, str(dtype).removeprefix("torch.")
        row["gflops"] = elements * sum(FLOPS[op]) / row["both_ms"] * 1e-6
        row["speedup"] = rows[-1]["both_ms"] / row["both_ms"] if rows[-1]["name"] == "naive" else None
        found = row.pop("results")
        # A peer's gradient of its own form of the decay is another function's.
        ours = references is not None and row["name"] not in peers.get(op, {})
        row["error"] = max(error(x, y) for x, y in zip(found, references, strict=True)) if ours else None
    return rows


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS = (
    "op | shape | dtype | backend | forward ms: best (median) | forward + backward ms: best (median) | processor ms"
    " | GFLOP/s | share of FMA rate | of GEMM | times the loop | kept B per token-channel | error"
)
HEADING = f"| {COLUMNS} |\n" + "|---" * 13 + "|"


def line(row: dict, fma: float | None, gemm: float) -> str:
    """A row in Markdown."""
    shape = " ".join(f"{letter}{n}" for letter, n in zip("BTHN", row["shape"], strict=True))
    return (
        f"| {row['op']} | {shape} | {row['dtype']} | {row['name']}"
        f" | {row['forward_ms']:.2f} ({row['forward_median_ms']:.2f})"
        f" | {row['both_ms']:.2f} ({row['both_median_ms']:.2f}) | {row['processor_ms']:.1f} | {row['gflops']:.0f}"
        f" | {shown(row['gflops'] / fma if fma else None, '.0%')} | {row['gflops'] / gemm:.0%}"
        f" | {shown(row['speedup'], '.1f')} | {row['kept_bytes']:.1f} | {shown(row['error'], '.1e')} |"
    )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the recurrence kernels.")
    parser.add_argument("--op", nargs="+", choices=list(RECURRENCES), default=list(RECURRENCES))
    parser.add_argument("--large", action="store_true", help="also B1 T4096 H32 N64 (the loop then holds up to 9 GB)")
    parser.add_argument("--bf16", action="store_true", help="also bfloat16 inputs; on a GPU they are always timed")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"), help="instead of the usual ones")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="see benchmarks/peers.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=200, help="at most so many runs of one implementation")
    parser.add_argument("--seconds", type=float, default=4.0, help="and no longer than this")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no GPU")
    return args


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    device, on_gpu = torch.device(args.device), args.device == "cuda"
    shapes: list[Shape] = [(1, 1024, 12, 64)]
    if on_gpu:
        shapes += [(8, 4096, 64, 64), (1, 4096, 32, 64)]
    elif args.large:
        shapes += [(1, 4096, 32, 64)]
    if args.shape:
        shapes = [tuple(args.shape)]
    try:
        peers = load_peers(args.peer, shapes[0][-1])
    except ValueError as error:
        sys.exit(str(error))
    dtypes = [torch.float32] + [torch.bfloat16] * (args.bf16 or on_gpu)
    fma, gemm = (None if on_gpu else fma_gflops(args.threads)), gemm_gflops(device)
    on = f"{platform.machine()} {instruction_set()}, {args.threads} threads"
    machine = f"{torch.cuda.get_device_name() if on_gpu else on}, torch {torch.__version__}"
    rates = f"float32 matrix product: {gemm:.0f} GFLOP/s" + (f"; multiply-adds: {fma:.0f} GFLOP/s" if fma else "")
    print(f"{machine}; {rates}\n\n{HEADING}")
    figures = {"machine": machine, "gemm_gflops": gemm, "fma_gflops": fma, "rows": []}
    for op, dtype, shape in itertools.product(args.op, dtypes, shapes):
        found = bench(op, shape, dtype, device, peers, (args.repeats, args.seconds))
        print(*(line(row, fma, gemm) for row in found), sep="\n", flush=True)
        figures["rows"] += found
        if args.json:  # at once: what is measured stays when time runs out
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
