"""Optimizer groups: one per (lr_init, lr_final, weight_decay) of the layer profile, never one per tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.plan import Plan

NOTHING = "the layer profile trains nothing: give at least one row a mode other than freeze, or --state 1"

Key = tuple[float, float, float]


def parameter_groups(model: nn.Module, plan: Plan, version: str, layerwise: bool) -> list[dict[str, Any]]:
    """Trainable parameters of `model`, grouped by the rates of their profile rows.

    Each group carries `lr_init`, `lr_final`, `weight_decay` and the parameters' names. The rates of the tensors that an
    adapter calls fast are multiplied by `plan.lora_plus`. Raises ValueError when nothing trains.
    """
    fast = {f"{name}.{part}" for name, layer in matrices(model) for part in layer.fast}
    members: dict[Key, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            init, final, decay = plan.group(name, version, layerwise)
            times = plan.lora_plus if name in fast else 1.0
            members[init * times, final * times, decay].append((name, parameter))
    if not members:
        raise ValueError(NOTHING)
    return [
        {
            "params": [parameter for _, parameter in group],
            "names": [name for name, _ in group],
            "lr": key[0],
            "lr_init": key[0],
            "lr_final": key[1],
            "weight_decay": key[2],
        }
        for key, group in members.items()
    ]


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW with decoupled decay and float32 moments, in one fused pass over memory where torch has it."""
    return torch.optim.AdamW(list(groups), betas=betas, eps=eps, fused=True)
