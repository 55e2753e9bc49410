"""What a step of an optimizer of our own has around its update."""

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
