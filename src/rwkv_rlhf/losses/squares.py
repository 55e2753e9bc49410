"""How concentrated the policy's next-token distributions are: log sum_v p(v)^2, what a sampled token has on average.

Legend: M trained tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from rwkv_rlhf.losses.head import open_head
from rwkv_rlhf.precision import wide_dtype

ROWS = 64  # widened to float32 at a time: 16 MiB of a World vocabulary


@torch.no_grad()
def log_squares(head: nn.Module, hidden: Tensor, chunk: int) -> Tensor:
    """log sum_v p(v)^2 under softmax(head(hidden)), hidden (M,C) -> (M,) float32 (float64 of a float64 model), without
    gradient. One more product with the head, in chunks."""
    wide = wide_dtype(hidden.dtype)
    found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    run = open_head(head, hidden.detach(), chunk)
    for part in run.parts:
        blocks = (block.to(wide) for block in run.logits(part).split(ROWS))
        rows = [torch.logsumexp(2 * block, 1) - 2 * torch.logsumexp(block, 1) for block in blocks]
        found[part] = torch.cat(rows)
    return found
