"""Compiled recurrences, on whatever device: what they are given, what they allocate, what they keep for backward.

The C functions and their arguments are described in cuda/call.h. All memory is allocated here.

B batch, T tokens, C channels, H heads, N head size, S rows (of the batch, or packed segments), I checkpoint intervals
"""

import array
import ctypes
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops.starts import Starts

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Layout(NamedTuple):
    """The tensors of an op in the order of its C functions.

    First `tokens` inputs of shape (B, T, H, N) or (B, T, C) and one dtype, then `vectors` inputs of one token's shape
    in float32; between forward and backward the tensors of `kept`, float32: "interval", a state for each checkpoint,
    (I, H, N, N) or (I, C, 3), or "token", shaped like a per-token input.
    """

    tokens: int
    vectors: int = 0
    kept: tuple[str, ...] = ("interval",)


LAYOUTS = {
    "wkv4": Layout(tokens=2, vectors=2),  # k, v | w, u
    "wkv5": Layout(tokens=3, vectors=2),  # r, k, v | w, u
    "wkv6": Layout(tokens=4, vectors=1),  # r, k, v, w | u
    "wkv7": Layout(tokens=6, kept=("interval", "token")),  # r, w, k, v, a, b; it keeps sa as well
}


class Kernel:
    """One recurrence: `forward` and `backward` as ops/recurrence.py asks for them.

    Per-token inputs are float32 or bfloat16, vectors and states float32; strides are free. Raises ValueError for
    tensors that do not fit each other, and RuntimeError with the words of the C function if it fails.
    """

    scratch: tuple[str, ...] = ()  # float32 tensors that backward works in, by the words of `Layout.kept`
    partial = (
        0  # the last inputs whose gradients come as one for each interval, (I, H, N) or (I, C), and are summed here
    )

    def __init__(self, op: str, functions: ctypes.CDLL) -> None:
        self.op, self.layout, self.functions = op, LAYOUTS[op], functions
        functions.rwkv_interval.restype = ctypes.c_int64
        self.interval: int = functions.rwkv_interval()
        for name in ("rwkv_forward", "rwkv_backward"):
            function(functions, name)

    def forward(self, inputs: Sequence[Tensor], state: Tensor, starts: Sequence[int], keep: bool) -> list[Tensor]:
        """y, the final state, and if `keep` what backward needs. starts: where rows begin among the B T tokens, B T."""
        first, layout = inputs[0], self.layout
        rows = Starts.of(starts)
        self._check(inputs, state, rows)
        places = self._placed(rows, first.device)
        intervals = self._intervals(rows)[-1]
        kept = self._beside(layout.kept, first, state, intervals) if keep else []
        results = [self._like(first), self._like(state)]
        filled = [*results, *(kept if keep else itertools.repeat(None, len(layout.kept)))]
        self._call("rwkv_forward", [*inputs, state, places], filled, first, state, intervals)
        return [*results, *kept, places] if keep else results

    def backward(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], dy: Tensor, dlast: Tensor) -> list[Tensor]:
        """Gradients of the inputs, in their dtypes, and of the initial state."""
        first = inputs[0]
        if len(kept) != len(self.layout.kept) + 1:
            raise ValueError(f"{self.op}: forward kept nothing for backward")
        if dy.shape != first.shape or dy.dtype != first.dtype:
            raise ValueError(f"{self.op}: the gradient of y is {_about(dy)}, but y is {_about(first)}")
        intervals, *row = kept[0].shape
        if list(dlast.shape[1:]) != row or dlast.dtype != torch.float32:
            raise ValueError(f"{self.op}: the gradient of the final state is {_about(dlast)}, which does not fit it")
        whole = len(inputs) - self.partial
        grads = [self._like(x) for x in inputs[:whole]]
        grads += [self._empty((intervals, *x.shape), x.dtype, x.device) for x in inputs[whole:]]
        grads.append(self._like(dlast))
        scratch = self._beside(self.scratch, first, dlast, intervals)
        self._call("rwkv_backward", [*inputs, *kept, dy, dlast], [*grads, *scratch], first, dlast, intervals)
        return [grad.sum(0) if whole <= i < len(inputs) else grad for i, grad in enumerate(grads)]

    def graph_shapes(self, tokens: int, token: Sequence[int], state: Sequence[int]) -> list[Sequence[int]]:
        """Shapes of what a compiled graph keeps, float32: where borders lie is not known when it is made, so there is
        room for as many intervals as `tokens` and rows may have. token, state: shapes of an input and of the state."""
        intervals = tokens // self.interval + state[0]
        shapes = {"token": token, "interval": (intervals, *state[1:])}
        return [shapes[kind] for kind in self.layout.kept]

    def to_graph(self, kept: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What `forward` kept, in `graph_shapes`."""
        return [in_room(x, shape) for x, shape in zip(kept, shapes)]

    def from_graph(self, held: Sequence[Tensor], starts: Starts) -> list[Tensor]:
        """What `backward` wants, from what a graph held."""
        intervals = self._intervals(starts)[-1]
        kept = [x[:intervals] if kind == "interval" else x for kind, x in zip(self.layout.kept, held)]
        return [*kept, self._placed(starts, held[0].device)]

    def _check(self, inputs: Sequence[Tensor], state: Tensor, starts: Starts) -> None:
        """Whatever an offset in the C functions relies on."""
        op, layout = self.op, self.layout
        if len(inputs) != layout.tokens + layout.vectors:
            raise ValueError(f"{op}: there are {len(inputs)} inputs, but it needs {layout.tokens + layout.vectors}")
        first = inputs[0]
        shape, dtype = first.shape, first.dtype
        for i, x in enumerate(inputs):
            if i == layout.tokens:
                shape, dtype = shape[2:], torch.float32
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{op}: input {i} is {_about(x)}, but must be {dtype} {tuple(shape)}")
        batch, count, *token = first.shape
        if state.shape != (len(starts) - 1, *token, 3 if op == "wkv4" else token[-1]) or state.dtype != torch.float32:
            raise ValueError(f"{op}: the state is {_about(state)}, which does not fit {len(starts) - 1} rows")
        if not starts.fit(batch * count):
            raise ValueError(f"{op}: starts must rise from 0 to the {batch * count} tokens, not {starts}")

    def _placed(self, starts: Starts, device: torch.device) -> Tensor:
        return starts.on(device, ("places", self.interval), lambda: self._places(starts))

    def _places(self, starts: Starts) -> Tensor:
        """Where rows begin, among tokens and among intervals, and the longest rows first: 3 (S+1)."""
        lengths, marks = starts.lengths, self._intervals(starts)
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return torch.frombuffer(array.array("q", [*starts, *marks, *order, 0]), dtype=torch.int64)

    def _intervals(self, starts: Starts) -> list[int]:
        """Where rows begin among intervals, and I."""
        return list(itertools.accumulate((-(-n // self.interval) for n in starts.lengths), initial=0))

    def _beside(self, kinds: Sequence[str], token: Tensor, state: Tensor, intervals: int) -> list[Tensor]:
        """The tensors of `Layout.kept`, or other kinds of the same."""
        shapes = {"token": token.shape, "interval": (intervals, *state.shape[1:])}
        return [self._empty(shapes[kind], torch.float32, token.device) for kind in kinds]

    def _like(self, x: Tensor) -> Tensor:
        """Dense memory like x that a kernel fills."""
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that a kernel fills."""
        return torch.empty(shape, dtype=dtype, device=device)

    def _call(
        self,
        name: str,
        given: Sequence[Tensor],
        filled: Sequence[Tensor | None],
        token: Tensor,
        state: Tensor,
        intervals: int,
    ) -> None:
        """Run a C function on tensors that it reads and tensors that it fills; sizes come from `token` and `state`."""
        batch, count, *heads, size = token.shape
        sizes = (batch * count, state.shape[0], heads[0] if heads else 1, size, intervals)
        failure = self._run(name, [self._dense(x) for x in given], filled, sizes, DTYPES[token.dtype])
        if failure:
            raise RuntimeError(f"{name} of {self.op} on {token.device}: {failure}")

    def _dense(self, x: Tensor) -> Tensor:
        """x as the C functions want it."""
        return x.contiguous()

    def _run(
        self, name: str, given: list[Tensor], filled: Sequence[Tensor | None], sizes: Sequence[int], dtype: int
    ) -> str | None:
        """Call a C function on its device; what it answers."""
        raise NotImplementedError


def in_room(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x at the beginning of a tensor that may be longer."""
    if len(x) == shape[0]:
        return x
    room = x.new_empty(shape)
    room[: len(x)] = x
    return room


def call(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], sizes: Sequence[int], *rest: object
) -> str | None:
    """Call a C function of cuda/call.h; None, or its error."""
    return answer(function, [0 if x is None else x.data_ptr() for x in tensors], sizes, *rest)


def answer(function: Callable[..., Any], pointers: Sequence[int], sizes: Sequence[int], *rest: object) -> str | None:
    """The same for tensors that are given by their addresses."""
    # packed bytes pass as pointers to 64-bit numbers, and faster than arrays of ctypes
    count = len(pointers)
    numbers = struct.pack(f"{count + len(sizes)}q", *pointers, *sizes)
    failure = function(numbers, numbers[8 * count :], *rest)
    return None if failure is None else failure.decode()


def function(library: ctypes.CDLL, name: str) -> Callable[..., Any]:
    """A C function of cuda/call.h that answers null or the text of an error."""
    getattr(library, name).restype = ctypes.c_char_p
    found: Callable[..., Any] = getattr(library, name)
    return found


def _about(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
