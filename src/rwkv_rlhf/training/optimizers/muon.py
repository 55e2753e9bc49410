"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

Muon (Jordan, kellerjordan.github.io/posts/muon; torch.optim.Muon) updates a matrix by its momentum made orthogonal. Its
update is multiplied by 0.2 sqrt(max(rows, columns)) (Liu et al., arXiv 2502.16982, equation 4), which gives it the
size of AdamW's, so that both take the same learning rates and decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rwkv_rlhf.training.optimizers import takes
from rwkv_rlhf.training.optimizers.stepping import Stepping

MOMENTUM = 0.95


def muon(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """`betas` and `eps` are AdamW's; Muon's momentum is 0.95, with Nesterov's look ahead.

    Raises ValueError when nothing that trains is a matrix of a block.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        members = list(zip(group["names"], group["params"], strict=True))
        for chosen, own in ((matrices, True), (others, False)):
            part = [(name, p) for name, p in members if takes("muon", name, p) is own]
            if part:
                chosen.append(group | {"names": [name for name, _ in part], "params": [p for _, p in part]})
    if not matrices:
        raise ValueError("{optim} muon: nothing that trains is a matrix of a block, so use {optim} adamw")
    return MuonAndAdamW(matrices, others, betas, eps)


class MuonAndAdamW(Stepping):
    """Two optimizers over groups and states that they share with this one."""

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__([*matrices, *others], {})
        first, rest = self.param_groups[: len(matrices)], self.param_groups[len(matrices) :]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(first, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")
        ]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True))
        for part in self.parts:
            part.state = self.state

    def update(self) -> None:
        """One step of both."""
        for part in self.parts:
            part.step()
