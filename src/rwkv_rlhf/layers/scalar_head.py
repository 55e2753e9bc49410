"""A head that makes one number of a hidden state: the score of a reward model, the value of PPO.

Legend: C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkv_rlhf.precision import wide_dtype


class ScalarHead(nn.Module):
    """hidden . weight, without bias, `weight` (1, C), as sequence classifiers of the transformers library have it.

    It begins at zero: every reward and every value is exactly 0 before the first step, whatever the seed. The first
    step then reaches the head alone, the second one what is below it.
    """

    __call__: Callable[..., Tensor]  # PyTorch says Any
    weight: nn.Parameter

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> (...) float32 (float64 of a float64 model): rewards are compared, so nothing is rounded
        to the dtype of the activations."""
        wide = wide_dtype(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(wide) @ self.weight[0].to(wide)
