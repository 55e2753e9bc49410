"""Blocks compiled by torch.compile: a graph for each kind of block, not for each block, and no break inside one.

What runs in C++, Triton or CUDA are operators of such a graph (ops/in_graph.py, layers/stores/in_graph.py); PyTorch
fuses what lies between them: norms, casts of float32 masters, low-rank vectors, residual sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as autograd

import rwkv_rlhf.layers.stores.in_graph  # noqa: F401 - registers its operators
from rwkv_rlhf.model.blocks import Block
from rwkv_rlhf.model.state import LayerState, carry
from rwkv_rlhf.ops.in_graph import NAMESPACE, of_edges, separate
from rwkv_rlhf.settings.exit_status import Failure

KINDS = 256  # most graphs of one run: kinds of blocks by adapters, by their states, with and without gradients

BlockCall = Callable[..., tuple[Tensor, Any, LayerState | None]]


def compiled_blocks(backend: str) -> BlockCall:
    """What stands in the place of block(...) for the arguments (block, *those of its call); `backend` is
    torch.compile's. Dropouts draw what they draw without compiling."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, KINDS)
    autograd.force_non_lazy_backward_lowering = True  # so that `call` has its errors too, not the backward pass
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    compiled = torch.compile(run, backend=backend, fullgraph=True, options=options)

    def call(block: Block, *arguments: Any) -> tuple[Tensor, Any, LayerState | None]:
        # not compiled(block, ...) alone: hooks, as those of fsdp, stay outside of the graph
        block.forward = partial(compiled, block)  # type: ignore[method-assign]
        try:
            found: tuple[Tensor, Any, LayerState | None] = block(*arguments)
        except TorchDynamoException as error:
            raise Failure(f"--compile 1: {what_to_do(first_line(error))}") from error
        finally:
            del block.forward
        return found

    return call


def run(block: Block, *arguments: Any) -> tuple[Tensor, Any, LayerState | None]:
    """One block without its hooks; a function, so that the graph of one serves all that are alike."""
    found: tuple[Tensor, Any, LayerState | None] = type(block).forward(block, *arguments)
    return found


def what_to_do(said: str) -> str:
    """What PyTorch says, and how to go on. inductor takes up its files again, half ones of a killed run too."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    half = f"remove {folder}, where a run that was stopped may have left half a file, or " if folder in said else ""
    return f"{said}; {half}leave it 0"


def first_line(error: Exception) -> str:
    """What PyTorch says of a graph that it could not compile."""
    lines = str(error).strip().splitlines()
    told = lines[1:2] if str(error).startswith("backend=") else lines[:1]  # "backend='inductor' raised:" comes first
    about = [line.strip() for line in lines[1:] if "debug context" in line]
    return f"{type(error).__name__}: {'; '.join([*told, *about])}"


@torch.library.custom_op(f"{NAMESPACE}::carry", mutates_args=())
def carried(x: Tensor, last: Tensor | None, edges: Tensor) -> Tensor:
    """`carry` of a packed row x (1, T, C): (S, C)."""
    return separate([carry(x, last, of_edges(edges, *x.shape[:2]))], [x])[0]


@carried.register_fake
def _(x: Tensor, last: Tensor | None, edges: Tensor) -> Tensor:
    return x.new_empty(len(edges) - 1, x.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::carry_backward", mutates_args=())
def carried_backward(grad: Tensor, edges: Tensor, tokens: int) -> list[Tensor]:
    """Gradients of x (1, T, C) and of `last` (S, C), in the dtype of `grad` (S, C)."""
    starts = of_edges(edges, 1, tokens)
    dx, dlast = grad.new_zeros(1, tokens, grad.shape[-1]), torch.zeros_like(grad)
    filled = starts.filled_on(grad.device)
    dx[0].index_copy_(0, starts.last_on(grad.device)[filled], grad[filled])
    if starts.some_empty:
        dlast = torch.where(starts.empty_on(grad.device)[:, None], grad, dlast)
    return [dx, dlast]


@carried_backward.register_fake
def _(grad: Tensor, edges: Tensor, tokens: int) -> list[Tensor]:
    return [grad.new_empty(1, tokens, grad.shape[-1]), grad.new_empty(grad.shape)]


def _saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, last, edges = inputs
    ctx.tokens, ctx.dtype = x.shape[1], None if last is None else last.dtype
    ctx.save_for_backward(edges)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    dx, dlast = torch.ops.rwkv_rlhf.carry_backward(grad, *ctx.saved_tensors, ctx.tokens)
    return dx, None if ctx.dtype is None else dlast.to(ctx.dtype), None


carried.register_autograd(_gradient, setup_context=_saves)
