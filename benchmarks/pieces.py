"""What it costs to cut long rows of the Triton recurrences into pieces: python benchmarks/pieces.py [--shape B T H N]

Needs Triton, no GPU, and says nothing about time. Counts the multiply-adds of all matrix products of one head, forward
and backward, in Triton's interpreter, on few tokens; a token costs the same in a long row. Prints for whole rows and
for pieces how many programs there are, how many tokens follow one another in each direction (the sweep and the piece),
and the multiply-adds by token and head.

B batch, T tokens, H heads, N head size
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from triton.runtime.interpreter import InterpreterBuilder

from rwkv_rlhf.ops.judge import make_inputs, make_state
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.triton.recurrences import GROUP, MatrixKernel, Tiles, piece_length, tiles

OPS = ("wkv5", "wkv6", "wkv7")
PIECES = 3  # of the rows that are counted


class Work(NamedTuple):
    """Multiply-adds of one head, forward and backward: of a token, and beside that of a token that is swept."""

    token: float
    swept: float


def products(op: str, size: int, cut: Tiles, length: int) -> int:
    """Multiply-adds of forward and backward over PIECES x GROUP tokens, cut at each `length` (0: not at all)."""
    count = 0
    dot = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        nonlocal count
        count += a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    starts = Starts([0, PIECES * GROUP])
    inputs = [x.detach() for x in make_inputs(op, (1, PIECES * GROUP, 1, size))]
    kernel = MatrixKernel(op, cut, length)
    with patch.object(InterpreterBuilder, "create_dot", counted):
        y, last, *kept = kernel.forward(inputs, make_state(op, 1, 1, size).detach(), starts, True)
        kernel.backward(inputs, kept, y, last)
    return count


def work(op: str, size: int, cut: Tiles) -> Work:
    """The multiply-adds of a version with these tiles."""
    joints = PIECES - 1
    whole = products(op, size, cut, 0)
    joined = 2 * joints * size**3 if op == "wkv7" else 0
    swept = products(op, size, cut, GROUP) - whole - joined
    return Work(whole / (PIECES * GROUP), swept / (joints * GROUP))


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"), default=(1, 4096, 32, 64))
    parser.add_argument("--processors", type=int, default=132)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of infinities that are masked
    torch.set_num_threads(1)
    batch, tokens, heads, size = args.shape
    shape = " ".join(f"{letter}{n}" for letter, n in zip("BTHN", args.shape, strict=True))
    print(f"{shape}, {args.processors} processors; counted, not timed\n")
    print("| op | rows | programs | tokens one after the other | multiply-adds a token and head, thousands |")
    print("|---|---|---:|---:|---:|")
    length = piece_length([tokens] * batch, heads, args.processors)
    for op in OPS:
        for used in dict.fromkeys((0, length)):
            count = -(-tokens // used) if used else 1
            cut = tiles(size, batch * count * heads, args.processors)
            each = work(op, size, cut)
            swept = used * (count - 1) * each.swept + (2 * (count - 1) * size**3 if op == "wkv7" else 0)
            name = f"{count} pieces of {used}" if used else "whole"
            chain = 2 * used if used else tokens
            programs = batch * count * heads * size // cut.values
            print(f"| {op} | {name} | {programs} | {chain} | {(each.token + swept / tokens) / 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
