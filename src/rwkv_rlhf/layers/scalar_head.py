"""A head that makes one number of a hidden state: the score of a reward model, the value of PPO.

It is a matrix of one row, hidden . weight without bias, `weight` (1, C), as sequence classifiers of the transformers
library have it, so a layer profile may give it an adapter as any other matrix. It begins at zero: every reward and
every value is exactly 0 before the first step, whatever the seed. The first step then reaches the head alone, the
second one what is below it.

Legend: C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_rlhf.precision import wide_dtype


def scalars(head: nn.Module, hidden: Tensor) -> Tensor:
    """hidden (..., C) -> (...) float32 (float64 of a float64 model): rewards are compared, so nothing is rounded to the
    dtype of the activations."""
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = head(hidden.to(wide_dtype(hidden.dtype)))
    return found.squeeze(-1)
