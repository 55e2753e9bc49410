"""The element-wise groups of RWKV-7 on the CPU: calls of cuda/cpu/elementwise.cpp, with memory for their results."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rwkv_rlhf.ops import cpu
from rwkv_rlhf.ops.starts import Starts


class RowSizes(NamedTuple):
    """Sizes of a call, in the order of `RowSizes` of cuda/cpu/rows.h."""

    rows: int
    width: int
    parts: int = 1  # heads of a row, or mixes
    tokens: int = 0  # rows of a sequence, where all are as long
    segments: int = 0  # how many sequences there are


class Call(NamedTuple):
    """One call of a group: its name, its sizes, and what comes out."""

    name: str
    sizes: RowSizes
    outputs: int
    like: int = 0  # which input the outputs are shaped like
    settings: tuple[Any, ...] = ()  # further arguments of the C functions


def prepared(name: str, tensors: Sequence[Tensor | None], *settings: Any) -> tuple[Call, tuple[Tensor | None, ...]]:
    """The call of a group for the arguments of its plain twin, and its tensors as the C functions take them."""
    if name == "token_mix":
        x, last, mixes = cast(tuple[Tensor, Tensor | None, Tensor], tensors)
        packed: Starts | None = settings[0]
        (batch, tokens, width), count = x.shape, mixes.shape[0]
        segments, edges = (batch, None) if packed is None else (len(packed) - 1, packed.tensor)
        sizes = RowSizes(batch * tokens, width, count, tokens, segments)
        return Call(name, sizes, count), (x, None if last is None else last.float(), mixes.float(), edges)
    given = cast(Sequence[Tensor], tensors)
    if name == "value_gate":
        v, v_first, v0, v12 = given
        return Call(name, _rows(v), 1), (v, v_first, v0.float(), v12)
    if name == "delta_keys":
        k, k_k, k_a, a0, a12 = given
        return Call(name, _rows(k, settings[0]), 3), (k, k_k.float(), k_a.float(), a0.float(), a12)
    assert name == "gated_norm", name
    y, r, k, v, r_k, weight, bias, g = given
    call = Call(name, _rows(g, y.shape[2]), 1, like=7, settings=(ctypes.c_float(settings[0]),))
    return call, (y, r, k, v, r_k.float(), weight.float(), bias.float(), g)


def _rows(x: Tensor, heads: int = 1) -> RowSizes:
    """Sizes of activations (B,T,C)."""
    batch, tokens, width = x.shape
    return RowSizes(batch * tokens, width, heads)


def forward(call: Call, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of a group for its inputs: activations of one dtype, the first of them first, and float32 vectors."""
    given = cast(list[Tensor], _dense(tensors))  # what may be None is not looked at here
    outs = tuple([torch.empty_like(given[call.like]) for _ in range(call.outputs)])
    cpu.call("elementwise", "rwkv_" + call.name, given[0].dtype, [*given, *outs], call.sizes, *call.settings)
    return outs


def backward(
    call: Call, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs that `need` one, from those of the outputs (None: zero)."""
    given = cast(list[Tensor], _dense(tensors))
    found = [torch.empty_like(t) if n else None for t, n in zip(given, need)]
    function, all_tensors = f"rwkv_{call.name}_backward", [*_dense(grads), *given, *found]
    cpu.call("elementwise", function, given[0].dtype, all_tensors, call.sizes, *call.settings)
    return found


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2; see `elementwise.relu_squared`."""
    return forward(Call("relu_squared", RowSizes(x.numel(), 1), 1), (x,))[0]


def relu_squared_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of x, from that of `out` = max(x, 0)^2."""
    return forward(Call("relu_squared_backward", RowSizes(out.numel(), 1), 1), (grad, out))[0]


def _dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
