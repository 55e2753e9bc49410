"""Optimizer groups: one per (lr_init, lr_final, weight_decay) of the layer profile, never one per tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.plan import Plan, Rates

NOTHING = "the layer profile trains nothing: give at least one row a mode other than freeze, or --state 1"


def parameter_groups(model: nn.Module, plan: Plan, version: str, layerwise: bool) -> list[dict[str, Any]]:
    """Trainable parameters of `model`, grouped by the rates of their profile rows.

    Each group carries `lr_init`, `lr_final`, `weight_decay` and the parameters' names. The rates of the tensors that an
    adapter calls its factor B are multiplied by `plan.lora_plus`. Raises ValueError when nothing trains.
    """
    factors_b = {f"{name}.{part}" for name, layer in matrices(model) for part in layer.factor_b}
    members: dict[Rates, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates = plan.group(name, version, layerwise)
            times = plan.lora_plus if name in factors_b else 1.0
            rates = Rates(rates.lr_init * times, rates.lr_final * times, rates.weight_decay)
            members[rates].append((name, parameter))
    if not members:
        raise ValueError(NOTHING)
    return [
        {
            "params": [parameter for _, parameter in group],
            "names": [name for name, _ in group],
            "lr": rates.lr_init,
            **rates._asdict(),
        }
        for rates, group in members.items()
    ]


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW with decoupled decay and float32 moments, in one fused pass over memory where torch has it."""
    return torch.optim.AdamW(list(groups), betas=betas, eps=eps, fused=True)
