"""Packed matrices as torch.compile sees them: operators of torch.library, as those of ops/in_graph.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.layers.stores.store import Store
from rwkv_rlhf.ops.in_graph import NAMESPACE


def store_of(mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int]) -> Store:
    """The store of matrix (out, in) `shape` that has these buffers."""
    found = store_class(mode)
    assert found is not None, mode
    return found(torch.Size(shape), **dict(zip(names.split(), buffers, strict=True)))


@torch.library.custom_op(f"{NAMESPACE}::packed_product", mutates_args=())
def packed_product(x: Tensor, mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """x (..., in) -> x W^T (..., out) in x.dtype."""
    return store_of(mode, names, buffers, shape).product(x).contiguous()


@packed_product.register_fake
def _(x: Tensor, mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op(f"{NAMESPACE}::packed_product_backward", mutates_args=())
def packed_product_backward(
    upstream: Tensor, mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int]
) -> Tensor:
    """The gradient of x (..., in), from that of the product (..., out)."""
    return (upstream @ store_of(mode, names, buffers, shape).unpack(upstream.dtype)).contiguous()


@packed_product_backward.register_fake
def _(upstream: Tensor, mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return upstream.new_empty(*upstream.shape[:-1], shape[1])


def _saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.mode, ctx.names, buffers, ctx.shape = inputs
    ctx.save_for_backward(*buffers)


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    buffers = list(ctx.saved_tensors)
    found = None
    if ctx.needs_input_grad[0]:
        found = torch.ops.rwkv_rlhf.packed_product_backward(upstream, ctx.mode, ctx.names, buffers, ctx.shape)
    return found, None, None, [None] * len(buffers), None


packed_product.register_autograd(_gradient, setup_context=_saves)


@torch.library.custom_op(f"{NAMESPACE}::unpacked", mutates_args=())
def unpacked(mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in), which has no gradient."""
    return store_of(mode, names, buffers, shape).unpack(dtype)


@unpacked.register_fake
def _(mode: str, names: str, buffers: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return buffers[0].new_empty(*shape, dtype=dtype)
