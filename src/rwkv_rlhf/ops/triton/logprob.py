"""Statistics of log-softmax rows and the gradient of logits through Triton; see ops/logprob.py.

n rows (tokens), V vocabulary
"""

import torch
import triton
from torch import Tensor

from rwkv_rlhf.ops.triton import rows
from rwkv_rlhf.ops.triton.launch import current, dense

BLOCK = 2048


def row_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target's logit, sum, maximum and its index of each row of logits (n, V)."""
    x = logits if logits.device.type != "cpu" and logits.stride(1) == 1 else dense(logits)
    lse, target, total, top = torch.empty(4, len(x), device=x.device)
    argmax = torch.empty(len(x), dtype=torch.int64, device=x.device)
    width = min(BLOCK, triton.next_power_of_2(x.shape[1]))
    with current(x.device):
        rows.row_stats[(len(x),)](
            x, targets.contiguous(), lse, target, total, top, argmax, x.stride(0), x.shape[1], BLOCK=width
        )
    return lse, target, total, top, argmax


def row_grad_(logits: Tensor, *vectors: Tensor) -> Tensor:
    """Overwrite logits (n, V) by their gradient; vectors: targets, lse, g_logp, g_mean, argmax, g_max, each (n,)."""
    x = logits if logits.device.type != "cpu" and logits.stride(1) == 1 else dense(logits)
    width = min(BLOCK, triton.next_power_of_2(x.shape[1]))
    with current(x.device):
        rows.row_grad[(len(x), triton.cdiv(x.shape[1], width))](
            x, *(v.contiguous() for v in vectors), x.stride(0), x.shape[1], BLOCK=width
        )
    return logits if x is logits else logits.copy_(x)
