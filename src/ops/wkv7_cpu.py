"""WKV-7 by cuda/cpu/wkv7.cpp: float32 arithmetic on bfloat16 or float32 tensors.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.ops.build import library


def wkv7_cpu(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `wkv7` on checked arguments; the same contract as `wkv7_naive`.

    Kept for backward besides the inputs, in float32 per token and channel: sa (4 bytes) and a state every 64 tokens
    (N / 16 bytes).
    """
    batch, tokens = r.shape[:2]
    starts = torch.tensor([0, *(lengths if lengths is not None else [tokens] * batch)]).cumsum(0)
    return _Wkv7.apply(r, w, k, v, a, b, state, starts)


class _Wkv7(torch.autograd.Function):
    """y, final state = f(r, w, k, v, a, b, initial state)."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, starts):
        flat = [x.flatten(0, 1) for x in (r, w, k, v, a, b)]
        keep = any(ctx.needs_input_grad)
        y, last, sa, checkpoints = library("wkv7").forward(*flat, state, starts, keep)
        if keep:
            ctx.save_for_backward(r, w, k, v, a, b, starts, sa, checkpoints)
        return y.view(r.shape), last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        *inputs, starts, sa, checkpoints = ctx.saved_tensors
        flat = [x.flatten(0, 1) for x in inputs]
        *grads, dstate = library("wkv7").backward(*flat, starts, sa, checkpoints, dy.flatten(0, 1), dlast)
        return (*(grad.view(x.shape) for grad, x in zip(grads, inputs, strict=True)), dstate, None)
