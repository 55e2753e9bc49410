"""Element-wise groups of RWKV-7 ("Goose", arXiv 2503.14456, section 4), each one differentiable function.

Legend: B batch, T tokens, C width, H heads, N head size (C = H * N), S segments of a packed row, M mixes.
Activations are bfloat16, float32 or (naive) float64, all of one dtype; small per-channel vectors may be float32
masters. Arithmetic is float32 inside (float64 for float64 activations), a result is rounded once to the activations'
dtype, and gradients reach every tensor. Per-channel gradients are summed in an order that depends on the number of
rows alone, so equal inputs give equal bits for any number of threads. `backend` is "auto" or a name of
`tables.BACKENDS`. Every function raises ValueError for shapes or dtypes that do not fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.ops import elementwise_cpu as host
from rwkv_rlhf.ops import elementwise_naive as naive
from rwkv_rlhf.ops.backends import choose
from rwkv_rlhf.ops.elementwise_cpu import Call
from rwkv_rlhf.ops.starts import Starts


def token_mix(
    x: Tensor, last: Tensor | None, starts: Tensor | Starts | None, mixes: Tensor, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Interpolate every token with its predecessor: out_m = x + (shift(x) - x) * mix_m.

    x (B,T,C); mixes (M,C). The predecessor of a row's first token is `last` (B,C), or zero if `last` is None.
    With `starts` (S+1,) int64 (cumulative lengths, B = 1) every segment is a row of its own and `last` is (S,C);
    empty segments are legal, their row of `last` is unused and has gradient zero. Returns M tensors (B,T,C).
    """
    if torch.compiler.is_compiling():  # `starts` is a tensor then, or None
        return _in_graph("token_mix", (x, mixes) if last is None else (x, last, mixes), starts, 0.0, backend)
    packed = None if starts is None else Starts.of(starts)
    _check_mix(x, last, packed, mixes)
    return _run("token_mix", (x, last, mixes), packed, backend=backend)


def value_gate(v: Tensor, v_first: Tensor, v0: Tensor, v12: Tensor, backend: str = "auto") -> Tensor:
    """Mix a layer's values with layer 0's: v + (v_first - v) * sigmoid(v0 + v12).

    v, v_first, v12 (B,T,C); v0 (C,). Returns (B,T,C).
    """
    _check("value_gate", {"v": v, "v_first": v_first, "v12": v12}, {"v0": v0})
    return _run("value_gate", (v, v_first, v0, v12), backend=backend)[0]


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
    new_k, minus_kk, kk_a = _run("delta_keys", (k, k_k, k_a, a0, a12), heads, backend=backend)
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
    return _run("gated_norm", (y, r, k, v, r_k, weight, bias, g), eps, backend=backend)[0]


def relu_squared(x: Tensor, backend: str = "auto") -> Tensor:
    """max(x, 0)^2 of any shape, in x's dtype. What is kept for the gradient is the output, not x."""
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.rwkv_rlhf.relu_squared(x, backend)
        return found
    ops = operations(backend_of(x, backend))
    out: Tensor = _ReluSquared.apply(x, ops) if _records(x) else ops.relu_squared(x)
    return out


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + y, and the LayerNorm of that sum over the width.

    x, y (B,T,C); weight, bias (C,). What is kept for the gradient is the sum, which is rounded before it is normalised.
    Only Triton has a kernel; PyTorch's own are as fast on a CPU, and torch.compile makes one of its own.
    """
    plain = torch.compiler.is_compiling() or (x.is_cpu and backend == "auto")  # spares decoding a question
    if plain or backend_of(x, backend) != "triton":
        return naive.residual_norm(x, y, weight, bias, eps)
    _check("residual_norm", {"x": x, "y": y}, {"weight": weight, "bias": bias})
    if _records(x, y, weight, bias):
        total, normed = _ResidualNorm.apply(x, y, weight, bias, eps)
    else:
        total, normed = operations("triton").residual_norm(x, y, weight, bias, eps)
    return total, normed


class _ResidualNorm(torch.autograd.Function):
    """Saves the sum and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = operations("triton").residual_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtype = eps, bias.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx, dweight, dbias = operations("triton").residual_norm_backward(total, weight, dtotal, dnormed, ctx.eps)
        return dx, dx, dweight.to(weight.dtype), dbias.to(ctx.dtype), None


def backend_of(x: Tensor, wanted: str) -> str:
    """The name of the backend that takes these activations."""
    return choose("elementwise", x.device, x.dtype, tuple(x.shape), wanted)[0]


def operations(where: str) -> Any:
    """What holds the groups of a backend: the module of the C++ kernels, of Triton's, or of the plain twins."""
    if where == "cpu":
        return host
    if where == "triton":
        from rwkv_rlhf.ops.triton import elementwise as kernels  # importing Triton takes a second

        return kernels
    return naive


Setting = int | float | Starts | None
Some = Sequence[Tensor | None]


def _run(name: str, tensors: Some, *settings: Setting, backend: str) -> tuple[Tensor, ...]:
    """A group on the backend that takes its activations, the first of `tensors`."""
    if torch.compiler.is_compiling():
        number = settings[0] if settings else 0.0
        return _in_graph(name, tensors, None, number, backend)
    where = backend_of(_first(tensors), backend)
    if where == "cpu":
        return _kernel(*host.prepared(name, tensors, *settings))
    ops = operations(where)
    if where == "triton":
        found = ops.run(name, tensors, settings, _records(*tensors))
    else:
        found = _twin(getattr(ops, name), tuple(tensors), *settings)
    return found if isinstance(found, tuple) else (found,)


def _in_graph(name: str, tensors: Some, edges: Any, number: Any, backend: str) -> tuple[Tensor, ...]:
    """A group as torch.compile sees it: one operator, which ops/in_graph.py has registered."""
    return tuple(torch.ops.rwkv_rlhf.group(name, tensors, edges, float(number), backend))


def values(name: str, tensors: Some, settings: tuple[Setting, ...], backend: str) -> tuple[Tensor, ...]:
    """The results of group `name` for the arguments of its plain twin, without a gradient."""
    with torch.no_grad():
        return _run(name, tensors, *settings, backend=backend)


def gradients(
    name: str, tensors: Some, grads: Some, need: Sequence[bool], settings: tuple[Setting, ...], backend: str
) -> list[Tensor | None]:
    """Gradients of those `tensors` that `need` one, in their dtypes, from those of the results (None: zero)."""
    where = backend_of(_first(tensors), backend)
    if where == "cpu":
        call, given = host.prepared(name, tensors, *settings)
        found = host.backward(call, grads, given, need)
    elif where == "triton":
        found = list(operations(where).gradients(name, tensors, grads, settings))
    else:
        return recomputed(getattr(naive, name), tensors, settings, grads, need)
    return [None if g is None or x is None or not n else g.to(x.dtype) for g, x, n in zip(found, tensors, need)]


def _first(tensors: Some) -> Tensor:
    assert tensors[0] is not None
    return tensors[0]


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
        return None, None, *recomputed(ctx.function, ctx.saved_tensors, ctx.settings, grads, need)


def recomputed(
    function: Callable[..., Any], tensors: Some, settings: Sequence[Any], grads: Some, need: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of those `tensors` that `need` one, by running function(*tensors, *settings) once more."""
    reached = [at for at, grad in enumerate(grads) if grad is not None]
    if not reached:
        return [None] * len(need)
    given = [t.detach().requires_grad_() if t is not None and n else t for t, n in zip(tensors, need)]
    wanted = [t for t, n in zip(given, need) if t is not None and n]
    with torch.enable_grad():
        found = function(*given, *settings)
    outputs = found if isinstance(found, tuple) else (found,)
    slopes = [grads[at] for at in reached]
    made = iter(torch.autograd.grad([outputs[at] for at in reached], wanted, slopes, allow_unused=True))
    return [next(made) if t is not None and n else None for t, n in zip(given, need)]


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
