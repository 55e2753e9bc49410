"""The model that training began from, without a second model: what trains has its first values back for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class StartValues:
    """Copies of every tensor of `model` that trains, as it is now; adapters at zero are the model without them.

    It is to be made before an adapter or a resume point changes the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside the block the model is what it was; no gradient may be taken there."""
        parameters = dict(self.model.named_parameters())
        now = {name: parameters[name].data for name in self._kept}
        try:
            for name, first in self._kept.items():
                parameters[name].data = first
            yield
        finally:
            for name, value in now.items():
                parameters[name].data = value
