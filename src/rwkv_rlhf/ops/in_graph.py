"""The operations as torch.compile sees them: operators of torch.library in the namespace rwkv_rlhf.

One compiled graph serves all steps, so an operator takes tensors and plain values alone: the borders of a packed row
come as a tensor (S+1,) on the host, and each call chooses its backend anew. Values and gradients are those of
ops/elementwise.py and ops/recurrence.py, which ask for these operators while a graph is made; whoever compiles imports
this module first. Runs that are not compiled have nothing to do with it.

B batch, T tokens, H heads, N head size, S segments
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.ops import elementwise, wkv4, wkv5, wkv6, wkv7
from rwkv_rlhf.ops.backends import BACKENDS, choose, kernel
from rwkv_rlhf.ops.elementwise import Setting
from rwkv_rlhf.ops.starts import Starts, even_starts, known_starts

NAMESPACE = "rwkv_rlhf"
RECURRENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "wkv4": wkv4.wkv4,
    "wkv5": wkv5.wkv5,
    "wkv6": wkv6.wkv6,
    "wkv7": wkv7.wkv7,
}


def of_edges(edges: Tensor | None, batch: int, tokens: int) -> Starts:
    """The borders (S+1,) of a packed row, or those of a batch that is not packed."""
    return even_starts(batch, tokens) if edges is None else known_starts(tuple(edges.tolist()))


def like(x: Tensor) -> Tensor:
    """A dense tensor of the shape and dtype of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def separate(found: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """`found`, dense and in memory of their own: an operator's results share none with each other or what is given."""
    used = {x.untyped_storage().data_ptr() for x in given}
    results = []
    for x in found:
        x = x.contiguous()
        place = x.untyped_storage().data_ptr()
        results.append(x.clone() if place in used else x)
        used.add(place)
    return results


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Lets autograd record inside of an operator, where PyTorch has switched it off."""
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
    nothing = nothing - nothing
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing), torch.enable_grad():
        yield


# ---------------------------------------------------------------- recurrences


@torch.library.custom_op(f"{NAMESPACE}::recurrence", mutates_args=())
def recurrence(
    op: str, inputs: Sequence[Tensor], state: Tensor, edges: Tensor | None, backend: str, keep: bool
) -> list[Tensor]:
    """y, the final state, and if `keep` what the backend keeps for gradients, for the arguments of a kernel."""
    first = inputs[0]
    run = kernel_for(op, first, backend)
    if run is None:
        return separate(whole(op, edges, backend)(*inputs, state), [*inputs, state])
    rows = of_edges(edges, *first.shape[:2])
    y, last, *kept = run.forward(inputs, state, rows, keep)
    if keep:
        kept = run.to_graph(kept, run.graph_shapes(rows[-1], first.shape, state.shape))
    return [y.contiguous(), last, *kept]


@recurrence.register_fake
def _(op: str, inputs: Sequence[Tensor], state: Tensor, edges: Tensor | None, backend: str, keep: bool) -> list[Tensor]:
    first = inputs[0]
    run = kernel_for(op, first, backend)
    shapes = run.graph_shapes(first.shape[0] * first.shape[1], first.shape, state.shape) if keep and run else []
    return [like(first), like(state), *(state.new_empty(shape) for shape in shapes)]


@torch.library.custom_op(f"{NAMESPACE}::recurrence_backward", mutates_args=())
def recurrence_backward(
    op: str,
    inputs: Sequence[Tensor],
    held: Sequence[Tensor],
    edges: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the inputs and of the initial state. held: what forward kept, or the initial state alone."""
    first = inputs[0]
    run = kernel_for(op, first, backend)
    if run is None:
        given = [*inputs, *held]
        with autograd_inside():
            found = elementwise.recomputed(whole(op, edges, backend), given, (), (dy, dlast), [True] * len(given))
        return separate([torch.zeros_like(x) if g is None else g for g, x in zip(found, given)], [dy, dlast, *given])
    kept = run.from_graph(held, of_edges(edges, *first.shape[:2]))
    return separate(run.backward(inputs, kept, dy, dlast), [dy, dlast])


@recurrence_backward.register_fake
def _(
    op: str,
    inputs: Sequence[Tensor],
    held: Sequence[Tensor],
    edges: Tensor | None,
    dy: Tensor,
    dlast: Tensor,
    backend: str,
) -> list[Tensor]:
    return [*(like(x) for x in inputs), like(dlast)]


def _recurrence_saves(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    op, tensors, state, edges, backend, _ = inputs
    held = output[2:] or [state]
    ctx.op, ctx.backend, ctx.packed, ctx.count = op, backend, edges is not None, len(tensors)
    ctx.save_for_backward(*tensors, *held, *([] if edges is None else [edges]))


def _recurrence_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    edges = saved.pop() if ctx.packed else None
    inputs, held = saved[: ctx.count], saved[ctx.count :]
    *found, dstate = torch.ops.rwkv_rlhf.recurrence_backward(
        ctx.op, inputs, held, edges, grads[0], grads[1], ctx.backend
    )
    return None, found, dstate, None, None, None


recurrence.register_autograd(_recurrence_gradient, setup_context=_recurrence_saves)


def kernel_for(op: str, first: Tensor, backend: str) -> Any:
    """The kernel that runs `op`; None where that is one differentiable function."""
    shape = (1, 1, *first.shape[2:])
    name, _ = choose(op, first.device, first.dtype, shape, backend)
    if name == "naive" or BACKENDS[name].own_gradient:
        return None
    return kernel(op, name, first.device, first.dtype, shape)


def whole(op: str, edges: Tensor | None, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The public function of a recurrence, for its inputs and the initial state."""
    starts = None if edges is None else known_starts(tuple(edges.tolist()))
    return partial(RECURRENCES[op], starts=starts, backend=backend)


# ---------------------------------------------------------------- element-wise groups


@torch.library.custom_op(f"{NAMESPACE}::group", mutates_args=())
def group(name: str, tensors: Sequence[Tensor], edges: Tensor | None, number: float, backend: str) -> list[Tensor]:
    """The results of a group. tensors: those of its plain twin, without `last` where that is None. number: its
    setting."""
    given, settings = arguments(name, tensors, edges, number)
    return separate(elementwise.values(name, given, settings, backend), tensors)


@group.register_fake
def _(name: str, tensors: Sequence[Tensor], edges: Tensor | None, number: float, backend: str) -> list[Tensor]:
    counts = {"token_mix": len(tensors[-1]), "delta_keys": 3}
    out = tensors[-1] if name == "gated_norm" else tensors[0]
    return [like(out) for _ in range(counts.get(name, 1))]


@torch.library.custom_op(f"{NAMESPACE}::group_backward", mutates_args=())
def group_backward(
    name: str,
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    need: Sequence[bool],
    edges: Tensor | None,
    number: float,
    backend: str,
) -> list[Tensor]:
    """Gradients of those tensors that need one."""
    given, settings = arguments(name, tensors, edges, number)
    wanted = list(need) if len(given) == len(tensors) else [need[0], False, need[1]]
    with autograd_inside():
        found = elementwise.gradients(name, given, grads, wanted, settings, backend)
    made = [g for g, n in zip(found, wanted) if n]
    zeros = [torch.zeros_like(t) for t, n in zip(tensors, need) if n]
    return separate([z if g is None else g for g, z in zip(made, zeros)], [*grads, *tensors])


@group_backward.register_fake
def _(
    name: str,
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    need: Sequence[bool],
    edges: Tensor | None,
    number: float,
    backend: str,
) -> list[Tensor]:
    return [like(t) for t, n in zip(tensors, need) if n]


def _group_saves(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.name, tensors, edges, ctx.number, ctx.backend = inputs
    ctx.packed = edges is not None
    ctx.save_for_backward(*tensors, *([] if edges is None else [edges]))


def _group_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    edges = tensors.pop() if ctx.packed else None
    need = list(ctx.needs_input_grad[1])
    found = iter(torch.ops.rwkv_rlhf.group_backward(ctx.name, grads, tensors, need, edges, ctx.number, ctx.backend))
    return None, [next(found) if n else None for n in need], None, None, None


group.register_autograd(_group_gradient, setup_context=_group_saves)


def arguments(
    name: str, tensors: Sequence[Tensor], edges: Tensor | None, number: float
) -> tuple[list[Tensor | None], tuple[Setting, ...]]:
    """The tensors and settings of a group's plain twin."""
    given: list[Tensor | None] = list(tensors)
    if name == "token_mix":
        if len(given) == len(["x", "mixes"]):
            given.insert(1, None)
        return given, (None if edges is None else of_edges(edges, *tensors[0].shape[:2]),)
    settings: dict[str, tuple[Setting, ...]] = {"delta_keys": (int(number),), "gated_norm": (number,)}
    return given, settings.get(name, ())


@torch.library.custom_op(f"{NAMESPACE}::relu_squared", mutates_args=())
def relu_squared(x: Tensor, backend: str) -> Tensor:
    """max(x, 0)^2 of any shape."""
    found: Tensor = elementwise.operations(elementwise.backend_of(x, backend)).relu_squared(x)
    return found.contiguous()


@relu_squared.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return like(x)


@torch.library.custom_op(f"{NAMESPACE}::relu_squared_backward", mutates_args=())
def relu_squared_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    """The gradient of x, from that of `out` = max(x, 0)^2."""
    ops = elementwise.operations(elementwise.backend_of(out, backend))
    found: Tensor = ops.relu_squared_backward(grad, out)
    return found.contiguous()


@relu_squared_backward.register_fake
def _(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return like(grad)


def _relu_saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.backend = inputs[1]


def _relu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.rwkv_rlhf.relu_squared_backward(grad, *ctx.saved_tensors, ctx.backend), None


relu_squared.register_autograd(_relu_gradient, setup_context=_relu_saves)
