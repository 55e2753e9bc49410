"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

Muon (Jordan, kellerjordan.github.io/posts/muon; torch.optim.Muon) updates a matrix by its momentum made orthogonal. Its
update is multiplied by 0.2 sqrt(max(rows, columns)) (Liu et al., arXiv 2502.16982, equation 4), which gives it the
size of AdamW's, so that both take the same learning rates and decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rwkv_rlhf.training.optimizers import adamw, parted, takes
from rwkv_rlhf.training.optimizers.stepping import Together

MOMENTUM = 0.95


def muon(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """`betas` and `eps` are AdamW's; Muon's momentum is 0.95, with Nesterov's look ahead.

    Raises ValueError when nothing that trains is a matrix of a block.
    """
    matrices, others = parted(groups, lambda name, parameter: takes("muon", name, parameter))
    if not matrices:
        raise ValueError("{optim} muon: nothing that trains is a matrix of a block, so use {optim} adamw")
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")
    ]
    if others:
        parts.append(adamw(others, betas, eps))
    return Together(parts)
