"""How concentrated the policy's next-token distributions are: log sum_v p(v)^2, what a sampled token has on average.

Legend: T tokens, M trained tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from src.losses.head import open_head
from src.losses.tokens import IGNORE

ROWS = 64  # widened to float32 at a time: 16 MiB of a World vocabulary


@torch.no_grad()
def log_squares(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log sum_v p(v)^2 under softmax(head(hidden)), hidden (T,C) -> (T,) float32 (float64 of a float64 model), without
    gradient; 0 where `targets` (T,) is IGNORE. One more product with the head, in chunks."""
    trained = (targets != IGNORE).nonzero()[:, 0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    found = torch.zeros(len(targets), dtype=wide, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        run = open_head(head, hidden.detach()[trained], chunk)
        for part in run.parts:
            blocks = (block.to(wide) for block in run.logits(part).split(ROWS))
            rows = [torch.logsumexp(2 * block, 1) - 2 * torch.logsumexp(block, 1) for block in blocks]
            found[trained[part]] = torch.cat(rows)
    return found
