"""ADOPT, an Adam that converges with any beta2 (Taniguchi et al., arXiv 2411.02853, algorithm 2, with clipping).

The second moment that divides a gradient is that of the steps before, and momentum is taken after the division. No
library that is needed anyway has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.training.optimizers.stepping import Stepping


def adopt(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """`eps` is the least divisor; the paper's values are betas 0.9, 0.9999 and eps 1e-6. Decay is decoupled."""
    return Adopt(list(groups), betas, eps)


class Adopt(Stepping):
    """m_t = beta1 m + (1 - beta1) clip(g_t / max(sqrt(v_{t-1}), eps), t^(1/4)); p -= lr m_t; v_t as Adam's.

    The first gradient only begins v. Gradients may be split over ranks: all is done number by number.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0})

    def update(self) -> None:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = gradient.square()
            return
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        bound = state["step"] ** 0.25
        divided = gradient / second.sqrt().clamp_(min=group["eps"])
        first.lerp_(divided.clamp_(-bound, bound), 1 - beta1)
        parameter.mul_(1 - rate * group["weight_decay"]).add_(first, alpha=-rate)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
