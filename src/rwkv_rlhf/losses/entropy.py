"""Entropy of the next token from hidden states, through the head, without ever holding (T, V) logits.

H = -sum_v p_v log p_v has the gradient dH/dz_v = -p_v (log p_v + H) with respect to the logits z. As in `tokens.py` the
backward pass computes each chunk of logits again, and every parameter gets its summed gradient once.

Legend: M rows, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_rlhf.losses.head import is_product, open_head
from rwkv_rlhf.ops.random_state import RandomState, replay
from rwkv_rlhf.precision import wide_dtype

ROWS = 64  # rows of logits that are widened to float32 at a time


def token_entropy(head: nn.Module, hidden: Tensor, head_chunk: int) -> Tensor:
    """Entropy (M,) in nats, float32 (float64 of float64), of softmax(head(hidden)), hidden (M,C); differentiable."""
    params = [p for p in head.parameters() if p.requires_grad]
    found: Tensor = _Entropy.apply(head, head_chunk, hidden, *params)
    return found


def _blocks(logits: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of logits at a time as log p, with their place."""
    for start in range(0, len(logits), ROWS):
        place = slice(start, min(start + ROWS, len(logits)))
        yield place, torch.log_softmax(logits[place].to(wide), 1)


class _Entropy(torch.autograd.Function):
    """(hidden (M,C), parameters) -> (M,)."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, head_chunk: int, hidden: Tensor, *params: Tensor) -> Tensor:
        ctx.random = RandomState.now(hidden.device) if head.training and not is_product(head) else None
        ctx.head, ctx.head_chunk = head, head_chunk
        wide = wide_dtype(hidden.dtype)
        entropy = hidden.new_empty(len(hidden), dtype=wide)
        run = open_head(head, hidden, head_chunk)
        for chunk in run.chunks:
            for place, logp in _blocks(run.logits(chunk), wide):
                entropy[chunk][place] = -(logp.exp() * logp).sum(1)
        ctx.save_for_backward(hidden, entropy, *params)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, entropy, *params = ctx.saved_tensors
        need_hidden, needed = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        with replay(ctx.random):
            run = open_head(ctx.head, hidden, ctx.head_chunk, [p for p, n in zip(params, needed) if n], need_hidden)
            for chunk in run.chunks:
                logits, slope, level = run.logits(chunk), upstream[chunk], entropy[chunk]
                for place, logp in _blocks(logits, entropy.dtype):
                    away = -logp.exp() * (logp + level[place, None]) * slope[place, None]
                    logits[place] = away.to(logits.dtype)
                run.push(chunk, logits)
        d_hidden, d_params = run.gradients()
        given = iter(d_params)
        return (None, None, d_hidden, *(next(given) if n else None for n in needed))
