"""What a step of an optimizer of our own has around its update, and several optimizers as one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Stepping(torch.optim.Optimizer):
    """An optimizer whose subclass says how everything is updated once."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # as torch's own
        """One step; with `closure`, which computes the loss and its gradients, its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @abstractmethod
    def update(self) -> None:
        """Update every parameter that has a gradient."""


class Together(Stepping):
    """Several optimizers, each of tensors of its own, as one with their groups and one state."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def update(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()
