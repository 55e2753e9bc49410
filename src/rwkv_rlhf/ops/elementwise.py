"""Element-wise groups of RWKV-7 ("Goose", arXiv 2503.14456, section 4), each one differentiable function.

Legend: B batch, T tokens, C width, H heads, N head size (C = H * N), S segments of a packed row, M mixes.
Activations are bfloat16, float32 or (naive) float64, all of one dtype; small per-channel vectors may be float32
masters. Arithmetic is float32 inside (float64 for float64 activations), a result is rounded once to the activations'
dtype, and gradients reach every tensor. Per-channel gradients are summed in an order that depends on the number of
rows alone, so equal inputs give equal bits for any number of threads. `backend` is "auto" or a name of
`tables.BACKENDS`. Every function raises ValueError for shapes or dtypes that do not fit.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.ops import elementwise_cpu as host
from rwkv_rlhf.ops import elementwise_naive as naive
from rwkv_rlhf.ops.backends import choose
from rwkv_rlhf.ops.elementwise_cpu import Call, RowSizes
from rwkv_rlhf.ops.starts import Starts


def token_mix(
    x: Tensor, last: Tensor | None, starts: Tensor | Starts | None, mixes: Tensor, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Interpolate every token with its predecessor: out_m = x + (shift(x) - x) * mix_m.

    x (B,T,C); mixes (M,C). The predecessor of a row's first token is `last` (B,C), or zero if `last` is None.
    With `starts` (S+1,) int64 (cumulative lengths, B = 1) every segment is a row of its own and `last` is (S,C);
    empty segments are legal, their row of `last` is unused and has gradient zero. Returns M tensors (B,T,C).
    """
    packed = None if starts is None else Starts.of(starts)
    _check_mix(x, last, packed, mixes)
    where = _backend(x, backend)
    if where == "cpu":
        (batch, tokens, width), count = x.shape, mixes.shape[0]
        segments, edges = (batch, None) if packed is None else (len(packed) - 1, packed.tensor)
        sizes = RowSizes(batch * tokens, width, count, tokens, segments)
        return _kernel(
            Call("token_mix", sizes, count), (x, None if last is None else last.float(), mixes.float(), edges)
        )
    return _elsewhere("token_mix", where, (x, last, mixes), packed)


def value_gate(v: Tensor, v_first: Tensor, v0: Tensor, v12: Tensor, backend: str = "auto") -> Tensor:
    """Mix a layer's values with layer 0's: v + (v_first - v) * sigmoid(v0 + v12).

    v, v_first, v12 (B,T,C); v0 (C,). Returns (B,T,C).
    """
    _check("value_gate", {"v": v, "v_first": v_first, "v12": v12}, {"v0": v0})
    where = _backend(v, backend)
    if where == "cpu":
        return _kernel(Call("value_gate", _rows(v), 1), (v, v_first, v0.float(), v12))[0]
    return _elsewhere("value_gate", where, (v, v_first, v0, v12))[0]


def delta_keys(
    k: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, a12: Tensor, heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of the delta rule: with a = sigmoid(a0 + a12) and kk = k * k_k of unit length in every head,
    returns k * (1 + (a - 1) * k_a), -kk and kk * a, each (B,T,C).

    k, a12 (B,T,C); k_k, k_a, a0 (C,); `heads` divides C. A norm below 1e-12 counts as 1e-12.
    """
    _check("delta_keys", {"k": k, "a12": a12}, {"k_k": k_k, "k_a": k_a, "a0": a0})
    if heads < 1 or k.shape[-1] % heads:
        raise ValueError(f"delta_keys: {heads} heads do not divide the width {k.shape[-1]}")
    where = _backend(k, backend)
    if where == "cpu":
        call = Call("delta_keys", _rows(k, heads), 3)
        new_k, minus_kk, kk_a = _kernel(call, (k, k_k.float(), k_a.float(), a0.float(), a12))
    else:
        new_k, minus_kk, kk_a = _elsewhere("delta_keys", where, (k, k_k, k_a, a0, a12), heads)
    return new_k, minus_kk, kk_a


def gated_norm(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    g: Tensor,
    eps: float = 64e-5,
    backend: str = "auto",
) -> Tensor:
    """What follows the recurrence: (GroupNorm_H(y) * weight + bias + (sum over the head of r * k * r_k) * v) * g.

    y (B,T,H,N); r, k, v, g (B,T,C); r_k (H,N); weight, bias (C,); eps is added to the variance. Returns (B,T,C).
    """
    if y.dim() != 4 or r_k.shape != y.shape[2:] or r_k.device != y.device:
        raise ValueError(f"gated_norm: y must be (B,T,H,N) and r_k (H,N), got {_describe(y)} and {_describe(r_k)}")
    rows = {"y": y.flatten(2), "r": r, "k": k, "v": v, "g": g}
    _check("gated_norm", rows, {"weight": weight, "bias": bias})
    where = _backend(y, backend)
    if where == "cpu":
        call = Call("gated_norm", _rows(g, y.shape[2]), 1, like=7, settings=(ctypes.c_float(eps),))
        return _kernel(call, (y, r, k, v, r_k.float(), weight.float(), bias.float(), g))[0]
    return _elsewhere("gated_norm", where, (y, r, k, v, r_k, weight, bias, g), eps)[0]


def relu_squared(x: Tensor, backend: str = "auto") -> Tensor:
    """max(x, 0)^2 of any shape, in x's dtype. What is kept for the gradient is the output, not x."""
    ops = _operations(_backend(x, backend))
    out: Tensor = _ReluSquared.apply(x, ops) if _records(x) else ops.relu_squared(x)
    return out


def _backend(x: Tensor, wanted: str) -> str:
    """The name of the backend that takes these activations."""
    return choose("elementwise", x.device, x.dtype, tuple(x.shape), wanted)[0]


def _operations(where: str) -> Any:
    """What holds the groups of a backend: the module of the C++ kernels, of Triton's, or of the plain twins."""
    if where == "cpu":
        return host
    if where == "triton":
        from rwkv_rlhf.ops.triton import elementwise as kernels  # importing Triton takes a second

        return kernels
    return naive


Setting = int | float | Starts | None


def _elsewhere(name: str, where: str, tensors: tuple[Tensor | None, ...], *settings: Setting) -> tuple[Tensor, ...]:
    """A group where the C++ kernels do not run: in Triton, or the plain twin."""
    ops = _operations(where)
    if where == "triton":
        found = ops.run(name, tensors, settings, _records(*tensors))
    else:
        found = _twin(getattr(ops, name), tensors, *settings)
    return found if isinstance(found, tuple) else (found,)


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _rows(x: Tensor, heads: int = 1) -> RowSizes:
    """Sizes of activations (B,T,C)."""
    batch, tokens, width = x.shape
    return RowSizes(batch * tokens, width, heads)


def _kernel(call: Call, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Run one group of kernels; without gradients straight, which matters when tokens are sampled one by one."""
    if _records(*tensors):
        outputs: tuple[Tensor, ...] = _Kernel.apply(call, *tensors)
        return outputs
    return host.forward(call, tensors)


class _Kernel(torch.autograd.Function):
    """A group of kernels. Only the inputs are saved, the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output nobody used costs nothing
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return host.forward(call, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *host.backward(ctx.call, grads, ctx.saved_tensors, ctx.needs_input_grad[1:])


def _twin(function: Callable[..., Any], tensors: tuple[Tensor | None, ...], *settings: Setting) -> Any:
    """Run a plain twin; where a gradient is wanted so that it keeps no more for it than the kernels do."""
    if _records(*tensors):
        return _Recomputed.apply(function, settings, *tensors)
    return function(*tensors, *settings)


class _Recomputed(torch.autograd.Function):
    """A plain twin. Only the inputs are saved: its float32 copies would be twice what the kernels keep of a block."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], settings: tuple[Setting, ...], *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.settings = function, settings
        return function(*tensors, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[2:]
        reached = [at for at, grad in enumerate(grads) if grad is not None]
        if not reached:
            return (None,) * (2 + len(need))
        tensors = [t.detach().requires_grad_() if n else t for t, n in zip(ctx.saved_tensors, need)]
        wanted = [t for t, n in zip(tensors, need) if n]
        with torch.enable_grad():
            found = ctx.function(*tensors, *ctx.settings)
        outputs = found if isinstance(found, tuple) else (found,)
        sources, slopes = [outputs[at] for at in reached], [grads[at] for at in reached]
        given = iter(torch.autograd.grad(sources, wanted, slopes, allow_unused=True))
        return None, None, *(next(given) if n else None for n in need)


class _ReluSquared(torch.autograd.Function):
    """Saves the output, which the matrix product that follows keeps as well. `ops`: the kernels, or the plain twins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: Any) -> Tensor:
        out: Tensor = ops.relu_squared(x)
        ctx.save_for_backward(out)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ops.relu_squared_backward(grad, *ctx.saved_tensors), None


def _check(op: str, rows: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    """`rows` of one shape (B,T,C), dtype and device, `vectors` of shape (C,)."""
    (first, x), *others = rows.items()
    if x.dim() != 3:
        raise ValueError(f"{op}: {first} must be (B,T,C), got {tuple(x.shape)}")
    for name, other in others:
        if (other.shape, other.dtype, other.device) != (x.shape, x.dtype, x.device):
            raise ValueError(f"{op}: {first} is {_describe(x)}, but {name} is {_describe(other)}")
    for name, vector in vectors.items():
        if vector.shape != x.shape[2:] or vector.device != x.device:
            raise ValueError(f"{op}: {name} must be ({x.shape[2]},) on {x.device}, got {_describe(vector)}")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _check_mix(x: Tensor, last: Tensor | None, starts: Starts | None, mixes: Tensor) -> None:
    if x.dim() != 3 or mixes.dim() != 2 or mixes.shape[1] != x.shape[2]:
        raise ValueError(f"token_mix: x must be (B,T,C) and mixes (M,C), got {tuple(x.shape)} and {tuple(mixes.shape)}")
    rows = x.shape[0]
    if starts is not None:
        if rows != 1:
            raise ValueError(f"token_mix: segment starts need B = 1, got B = {rows}")
        if not starts.fit(x.shape[1]):
            raise ValueError(f"token_mix: starts must rise from 0 to T = {x.shape[1]}, got {starts}")
        rows = len(starts) - 1
    if last is not None and last.shape != (rows, x.shape[2]):
        raise ValueError(f"token_mix: last must be {(rows, x.shape[2])}, got {tuple(last.shape)}")
    if x.device != mixes.device or (last is not None and last.device != x.device):
        raise ValueError(f"token_mix: x is on {x.device}, but last or mixes are not")
