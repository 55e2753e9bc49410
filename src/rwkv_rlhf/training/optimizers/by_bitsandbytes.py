"""Optimizers of the bitsandbytes library, on GPUs and on CPUs; decay is decoupled in all of them, as in AdamW.

Its 8-bit moments (Dettmers et al., arXiv 2110.02861) have a scale for each 256 numbers; tensors of less than 4096
numbers keep float32 moments. It waits for the device after each tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from rwkv_rlhf.settings.optimizers import OPTIMIZERS


def _library() -> ModuleType:
    # its import warns about an optional product kernel that is not used here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ValueError(f"{{optim}} needs bitsandbytes ({error}): pip install bitsandbytes") from error
    return optim


def adam8bit(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """The library's Adam8bit. It differs from AdamW8bit only in the decay of groups that name none; all of ours do."""
    least = OPTIMIZERS["adam8bit"].least
    made: torch.optim.Optimizer = _library().Adam8bit(list(groups), betas=betas, eps=eps, min_8bit_size=least)
    return made


def adamw8bit(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """The library's AdamW8bit."""
    least = OPTIMIZERS["adamw8bit"].least
    made: torch.optim.Optimizer = _library().AdamW8bit(list(groups), betas=betas, eps=eps, min_8bit_size=least)
    return made


def lion(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Lion: the sign of beta1 m + (1 - beta1) g, then m moves towards g by 1 - beta2. It has no eps."""
    made: torch.optim.Optimizer = _library().Lion(list(groups), betas=betas)
    return made
