"""Programs that take one token of each of a few rows through a model on a CPU: cuda/cpu/decode.cpp runs them.

A program is a list of operations, written once for a number of rows and run for each token; what lies between two of
them in float32 buffers of its own. Operations that are written together may run at the same time. Work that has no
operation here is a function of Python in its place. States are changed in place. Nothing is differentiable.

Legend: R rows, C width, A attention width, H heads, N head size, M mixes, D inner size of a low-rank vector.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_rlhf.ops import cpu
from rwkv_rlhf.ops.backend import build_failure
from rwkv_rlhf.ops.products import BLOCK, MOST_ROWS, STORED, Packed

RECORD = struct.Struct("4qd7q24q")  # `Op` of cuda/cpu/decode.h
SIZES, TENSORS = 7, 24
HEAD_SIZES = (32, 64, 128)
PANEL = 32  # rows that are laid out together, at most
WIDEST = 2  # numbers that one of them becomes, at most


class Kind(enum.IntEnum):
    """Operations, by the numbers of cuda/cpu/decode.cpp."""

    MIX = 0
    PRODUCT = 1
    LOW_RANK = 2
    SHARES6 = 3
    HEADS7 = 4
    HEADS6 = 5
    CHANNELS4 = 6
    LAYOUT = 7


class Finish(enum.IntEnum):
    """What is done with a product before it is written; ADDED adds it to what is there, ADDED_GATED times a gate."""

    PLAIN = 0
    RELU_SQUARED = 1
    SIGMOID = 2
    TANH = 3
    SILU = 4
    ADDED = 5
    ADDED_GATED = 6

    def write(self, product: Tensor, to: Tensor, gate: Tensor | None = None) -> None:
        """The same in PyTorch."""
        if self == Finish.ADDED:
            to += product
        elif self == Finish.ADDED_GATED:
            assert gate is not None
            to.addcmul_(gate, product)
        else:
            to.copy_(_FUNCTIONS[self](product))


_FUNCTIONS: dict[Finish, Callable[[Tensor], Tensor]] = {
    Finish.PLAIN: lambda x: x,
    Finish.RELU_SQUARED: lambda x: torch.relu(x).square_(),
    Finish.SIGMOID: torch.sigmoid,
    Finish.TANH: torch.tanh,
    Finish.SILU: torch.nn.functional.silu,
}


class Program:
    """Operations for `rows` rows. Every tensor that it names is kept, and must stay where it is."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._parts: list[list[bytes] | Callable[[], None]] = []
        self._buffers: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []
        self._runs: list[tuple[bytes, int] | Callable[[], None]] = []
        self._layouts: int | None = None  # where in the native call what lays out x for more products may stand

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Float32 memory of this shape; the same each time that one is asked for by this name."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(shape)
        assert self._buffers[name].shape == shape, name
        return self._buffers[name]

    def call(self, work: Callable[[], None]) -> None:
        """A function of Python, when everything before it is finished."""
        self._parts.append(work)

    def operation(
        self,
        kind: Kind,
        sizes: Sequence[int],
        tensors: Sequence[Tensor | None],
        *,
        finish: Finish = Finish.PLAIN,
        stored: torch.dtype = torch.float32,
        eps: float = 0.0,
        beside: bool = False,
    ) -> None:
        """An operation of cuda/cpu/decode.cpp; `beside`: it needs nothing of the one before."""
        for tensor in tensors:
            assert tensor is None or (tensor.is_contiguous() and tensor.is_cpu)
        self._kept += [tensor for tensor in tensors if tensor is not None]
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        words = [*sizes, *[0] * (SIZES - len(sizes))], [*pointers, *[0] * (TENSORS - len(pointers))]
        record = RECORD.pack(kind, 0 if beside else 1, STORED[stored], finish, eps, *words[0], *words[1])
        if not self._parts or callable(self._parts[-1]):
            self._parts.append([])
            beside = False
        self._records.append(record)
        if not beside:
            self._layouts = None

    @property
    def _records(self) -> list[bytes]:
        """Of the native call that is being written."""
        last = self._parts[-1]
        assert isinstance(last, list)
        return last

    @property
    def calls(self) -> int:
        """How many native calls and functions of Python a token takes."""
        return len(self._parts)

    def run(self) -> None:
        """One token. Raises RuntimeError with the words of the C function if it fails."""
        if not self._runs:
            self._runs = [part if callable(part) else (b"".join(part), len(part)) for part in self._parts]
        run = cpu.c_function("decode", "rwkv_decode")
        threads = torch.get_num_threads()
        for part in self._runs:
            if callable(part):
                part()
                continue
            records, count = part
            failure = run(records, struct.pack("q", count), 0, threads)
            if failure:
                raise RuntimeError(f"decode: {failure.decode()}")

    def mix(
        self,
        x: Tensor,
        norm: tuple[Tensor, Tensor],
        shift: Tensor | None,
        mixes: Tensor | None,
        *,
        eps: float,
        before: tuple[Tensor, Tensor] | None = None,
        difference: Tensor | None = None,
    ) -> list[Tensor]:
        """The normalised x (R, C), then its mixes (R, C) each with the token before, which `shift` holds and forgets.

        before: the norm of which x itself becomes the result first. difference: where the token before minus x goes.
        mixes (M, C) float32; shift (R, C), without which there is the norm alone.
        """
        width, count = x.shape[1], 0 if mixes is None else len(mixes)
        normed = self.buffer("normed", self.rows, width)
        mixed = self.buffer(f"mixes {count}", count, self.rows, width)
        first = before or (None, None)
        tensors = [x, *first, *norm, shift, mixes, mixed, normed, difference]
        dtype = torch.float32 if shift is None else shift.dtype
        self.operation(Kind.MIX, (self.rows, width, count), tensors, stored=dtype, eps=eps)
        return [normed, *mixed]

    def product(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        y: Tensor,
        finish: Finish = Finish.PLAIN,
        gate: Tensor | None = None,
        beside: bool = False,
    ) -> None:
        """y (R, O) = finish(x (R, K) W^T); weight as in ops/products.py."""
        given, scale, levels = weight if isinstance(weight, Packed) else (weight, None, None)
        inputs, many, stored = x.shape[1], self.rows > MOST_ROWS, given.dtype
        place = self._layouts if beside else None
        if many or stored != torch.float32:
            laid_out = self.buffer(f"laid out {x.data_ptr()} {stored}", self.rows + PANEL, WIDEST * (inputs + BLOCK))
            self.operation(Kind.LAYOUT, (self.rows, inputs, many), [x, laid_out], stored=stored, beside=beside)
            x, beside = laid_out, place is not None
            if place is not None:  # in front of the products that run at the same time
                self._records.insert(place, self._records.pop())
        sizes, tensors = (self.rows, inputs, y.shape[1], many), [x, given, scale, levels, y, gate]
        self.operation(Kind.PRODUCT, sizes, tensors, finish=finish, stored=stored, beside=beside)
        self._layouts = len(self._records) - 1 if place is None else place + 1

    def low_rank(
        self, x: Tensor, matrix: Tensor, y: Tensor, finish: Finish = Finish.PLAIN, beside: bool = False
    ) -> Tensor:
        """y = finish(x matrix): x (R, K), matrix (K, O), y (R, O); or x (R, M K), matrix (M, K, O), y (M, R, O)."""
        count, inner, outer = matrix.shape if matrix.dim() == 3 else (1, *matrix.shape)
        sizes = (self.rows, inner, outer, count, x.shape[1], inner)
        self.operation(Kind.LOW_RANK, sizes, [x, matrix, y], finish=finish, stored=matrix.dtype, beside=beside)
        return y


def missing() -> str | None:
    """Why there is no kernel here, warned about once; None if there is one."""
    return build_failure(cpu.Backend(), "decode", torch.device("cpu"), 0)
