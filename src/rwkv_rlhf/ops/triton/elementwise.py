"""The element-wise groups of ops/elementwise.py through Triton: memory and launches of pointwise.py.

B batch, T tokens, C width, H heads, N head size, S segments, M mixes
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.ops.elementwise_naive import NORM_EPS
from rwkv_rlhf.ops.starts import Starts, even_starts
from rwkv_rlhf.ops.triton import pointwise
from rwkv_rlhf.ops.triton.launch import current, dense

ROWS, BLOCK, LINE = 16, 64, 1024  # tokens and channels of a program; numbers of one of relu_squared
Tensors = Sequence[Tensor]
Some = Sequence[Tensor | None]


def run(name: str, tensors: Some, settings: tuple[Any, ...], records: bool) -> tuple[Tensor, ...]:
    """The results of group `name` for the arguments of its plain twin; with `records` Triton gives gradients too."""
    outputs: tuple[Tensor, ...]
    outputs = _Group.apply(name, settings, *tensors) if records else GROUPS[name].forward(tensors, *settings)
    return outputs


class _Group(torch.autograd.Function):
    """Only the inputs are saved, the rest is computed again."""

    @staticmethod
    def forward(ctx: Any, name: str, settings: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(*tensors)
        ctx.group, ctx.settings = name, settings
        outputs: tuple[Tensor, ...] = GROUPS[name].forward(tensors, *settings)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *gradients(ctx.group, ctx.saved_tensors, grads, ctx.settings)


def gradients(name: str, tensors: Some, grads: Some, settings: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients of the tensors of group `name`, in their shapes and dtypes, from those of its results."""
    found = GROUPS[name].backward(tensors, grads, *settings)
    return [g if g is None or x is None else g.view(x.shape).to(x.dtype) for g, x in zip(found, tensors, strict=True)]


class TokenMix:
    """x, last, mixes and the starts -> M tensors."""

    @staticmethod
    def forward(tensors: Some, starts: Starts | None) -> tuple[Tensor, ...]:
        """Values."""
        x, last, marks, mixes, rows, grid = TokenMix.arguments(tensors, starts)
        outs = tuple(torch.empty_like(x) for _ in range(len(mixes)))
        with current(x.device):
            pointwise.token_mix[grid](
                x,
                x if last is None else last,
                marks,
                mixes,
                outs,
                rows,
                x.shape[-1],
                M=len(mixes),
                HAS_LAST=last is not None,
                ROWS=ROWS,
                BLOCK=BLOCK,
            )
        return tuple(out.to(cast(Tensor, tensors[0]).dtype) for out in outs)

    @staticmethod
    def backward(tensors: Some, grads: Sequence[Tensor], starts: Starts | None) -> Some:
        """Gradients; of `last` zeros for empty segments."""
        x, last, marks, mixes, rows, grid = TokenMix.arguments(tensors, starts)
        dx, dlast = torch.empty_like(x), x.new_zeros(0) if last is None else torch.zeros_like(last)
        parts = mixes.new_empty(grid[0], *mixes.shape)
        with current(x.device):
            pointwise.token_mix_backward[grid](
                x,
                x if last is None else last,
                marks,
                mixes,
                tuple(dense(g) for g in grads),
                dx,
                dlast,
                parts,
                rows,
                x.shape[-1],
                M=len(mixes),
                HAS_LAST=last is not None,
                ROWS=ROWS,
                BLOCK=BLOCK,
            )
        return dx, None if last is None else dlast, parts.sum(0)

    @staticmethod
    def arguments(tensors: Some, starts: Starts | None) -> tuple[Any, ...]:
        """The arguments as the kernels take them."""
        x, last, mixes = cast(tuple[Tensor, Tensor | None, Tensor], tensors)
        batch, tokens, width = x.shape
        grid = triton.cdiv(batch * tokens, ROWS), triton.cdiv(width, BLOCK)
        rows = even_starts(batch, tokens) if starts is None else starts
        marks = rows.on(x.device, "marks", lambda: beginnings(rows))
        return dense(x), None if last is None else dense(last), marks, mixes.float().contiguous(), batch * tokens, grid


def beginnings(starts: Starts) -> Tensor:
    """For each token 0, or 1 + the row or segment that begins with it, int32; one more for segments after the end."""
    marks = torch.zeros(starts[-1] + 1, dtype=torch.int32)
    numbers = torch.arange(1, len(starts), dtype=torch.int32)
    # of segments that begin at one token only the last has any tokens
    return marks.scatter_reduce_(0, starts.tensor[:-1], numbers, "amax")


class ValueGate:
    """v, v_first, v0, v12 -> their mixture."""

    @staticmethod
    def forward(tensors: Tensors) -> tuple[Tensor, ...]:
        """Values."""
        v, first, v0, v12 = (dense(x) for x in tensors)
        out, grid = torch.empty_like(v), by_blocks(v)
        with current(v.device):
            pointwise.value_gate[grid](v, first, v0.float(), v12, out, *rows_of(v), ROWS=ROWS, BLOCK=BLOCK)
        return (out.to(tensors[0].dtype),)

    @staticmethod
    def backward(tensors: Tensors, grads: Sequence[Tensor]) -> Tensors:
        """Gradients."""
        v, first, v0, v12 = (dense(x) for x in tensors)
        dv, dfirst, dv12 = (torch.empty_like(v) for _ in range(3))
        grid = by_blocks(v)
        parts = torch.empty(grid[0], v.shape[-1], device=v.device)
        given = v, first, v0.float(), v12, dense(grads[0])
        with current(v.device):
            pointwise.value_gate_backward[grid](*given, dv, dfirst, dv12, parts, *rows_of(v), ROWS=ROWS, BLOCK=BLOCK)
        return dv, dfirst, parts.sum(0), dv12


class DeltaKeys:
    """k, k_k, k_a, a0, a12 and the number of heads -> k, a, b of the recurrence."""

    @staticmethod
    def forward(tensors: Tensors, heads: int) -> tuple[Tensor, ...]:
        """Values."""
        k, k_k, k_a, a0, a12 = (dense(x) for x in tensors)
        outs = [torch.empty_like(k) for _ in range(3)]
        vectors = k_k.float(), k_a.float(), a0.float()
        with current(k.device):
            pointwise.delta_keys[by_heads(k, heads)](
                k, *vectors, a12, *outs, *rows_of(k), EPS=NORM_EPS, **head(k.shape[-1] // heads)
            )
        return tuple(out.to(tensors[0].dtype) for out in outs)

    @staticmethod
    def backward(tensors: Tensors, grads: Sequence[Tensor], heads: int) -> Tensors:
        """Gradients."""
        k, k_k, k_a, a0, a12 = (dense(x) for x in tensors)
        dk, da12 = torch.empty_like(k), torch.empty_like(k)
        grid = by_heads(k, heads)
        parts = torch.empty(grid[0], 3, k.shape[-1], device=k.device)
        given = k, k_k.float(), k_a.float(), a0.float(), a12, *(dense(g) for g in grads)
        with current(k.device):
            pointwise.delta_keys_backward[grid](
                *given, dk, da12, parts, *rows_of(k), EPS=NORM_EPS, **head(k.shape[-1] // heads)
            )
        return dk, *parts.sum(0), da12


class GatedNorm:
    """y, r, k, v, r_k, weight, bias, g and eps -> what follows the recurrence."""

    @staticmethod
    def forward(tensors: Tensors, eps: float) -> tuple[Tensor, ...]:
        """Values."""
        y, r, k, v, r_k, weight, bias, g = (dense(x) for x in tensors)
        out = torch.empty_like(g)
        given = y, r, k, v, r_k.float(), weight.float(), bias.float(), g
        with current(y.device):
            pointwise.gated_norm[by_heads(g, y.shape[2])](*given, out, *rows_of(g), EPS=eps, **head(y.shape[3]))
        return (out.to(tensors[0].dtype),)

    @staticmethod
    def backward(tensors: Tensors, grads: Sequence[Tensor], eps: float) -> Tensors:
        """Gradients."""
        y, r, k, v, r_k, weight, bias, g = (dense(x) for x in tensors)
        dy, dr, dk, dv, dg = (torch.empty_like(g) for _ in range(5))
        grid = by_heads(g, y.shape[2])
        parts = torch.empty(grid[0], 3, g.shape[-1], device=g.device)
        given = y, r, k, v, r_k.float(), weight.float(), bias.float(), g, dense(grads[0])
        with current(y.device):
            pointwise.gated_norm_backward[grid](
                *given, dy, dr, dk, dv, dg, parts, *rows_of(g), EPS=eps, **head(y.shape[3])
            )
        return dy, dr, dk, dv, *parts.sum(0), dg


GROUPS: dict[str, Any] = {
    "token_mix": TokenMix,
    "value_gate": ValueGate,
    "delta_keys": DeltaKeys,
    "gated_norm": GatedNorm,
}


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and the LayerNorm of that."""
    given = dense(x), dense(y), weight.float().contiguous(), bias.float().contiguous()
    total, normed = torch.empty_like(given[0]), torch.empty_like(given[0])
    rows, width = rows_of(x)
    with current(x.device):
        pointwise.residual_norm[(triton.cdiv(rows, ROWS),)](*given, total, normed, rows, width, EPS=eps, **lanes(width))
    return total.to(x.dtype), normed.to(x.dtype)


def residual_norm_backward(
    total: Tensor, weight: Tensor, dtotal: Tensor, dnormed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of either summand, of the weight and of the bias (float32), from the sum and both gradients."""
    given = dense(total), weight.float().contiguous(), dense(dtotal), dense(dnormed)
    rows, width = rows_of(total)
    grid = (triton.cdiv(rows, ROWS),)
    dx, parts = torch.empty_like(given[0]), torch.empty(*grid, 2, width, device=total.device)
    with current(total.device):
        pointwise.residual_norm_backward[grid](*given, dx, parts, rows, width, EPS=eps, **lanes(width))
    dweight, dbias = parts.sum(0)
    return dx.to(total.dtype), dweight, dbias


def lanes(width: int) -> dict[str, int]:
    """Constants of the kernels by whole rows."""
    wide = triton.next_power_of_2(width)
    return {"ROWS": ROWS, "LANES": wide, "num_warps": 4 if wide <= LINE else 8 if wide <= 4 * LINE else 16}


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 of any shape."""
    given = dense(x)
    out = torch.empty_like(given)
    with current(x.device):
        pointwise.relu_squared[(triton.cdiv(x.numel(), LINE),)](given, out, x.numel(), BLOCK=LINE)
    return out.to(x.dtype)


def relu_squared_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of x, from that of `out` = max(x, 0)^2."""
    given, slope = dense(out), dense(grad)
    dx = torch.empty_like(given)
    with current(out.device):
        pointwise.relu_squared_backward[(triton.cdiv(out.numel(), LINE),)](given, slope, dx, out.numel(), BLOCK=LINE)
    return dx.to(grad.dtype)


def rows_of(x: Tensor) -> tuple[int, int]:
    """Tokens of all rows, and width."""
    return x.shape[0] * x.shape[1], x.shape[2]


def by_blocks(x: Tensor) -> tuple[int, int]:
    """The grid of tiles."""
    return triton.cdiv(x.shape[0] * x.shape[1], ROWS), triton.cdiv(x.shape[2], BLOCK)


def by_heads(x: Tensor, heads: int) -> tuple[int, int]:
    """The grid of tiles of one head each."""
    return triton.cdiv(x.shape[0] * x.shape[1], ROWS), heads


def head(size: int) -> dict[str, int]:
    """Constants of the kernels by heads."""
    return {"ROWS": ROWS, "N": size, "LANES": triton.next_power_of_2(size)}
