"""What the host must know of an optimizer step: it stays on the device until the step's end, then comes all at once."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.transfers import Fetched


class Figures(NamedTuple):
    """Numbers of one optimizer step: the sum of each metric and the loss of each micro-batch, the gradient's norm."""

    sums: dict[str, float]
    losses: list[float]
    norm: float | None


class StepFigures:
    """Collects () tensors of the micro-batches of one optimizer step.

    `losses`: of micro-batches whose loss nobody has looked at. `norm`: the gradient's, None until it is known.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None
        self._metrics: list[tuple[str, Tensor]] = []
        self._sent: Fetched | None = None

    def add(self, metrics: dict[str, Tensor]) -> None:
        """The metrics of one more micro-batch."""
        self._metrics += [(name, amount.detach()) for name, amount in metrics.items()]

    def send(self) -> None:
        """Let what is there go to the host, behind what is queued on the device so far."""
        numbers = [*(amount for _, amount in self._metrics), *self.losses, *([] if self.norm is None else [self.norm])]
        self._sent = Fetched(torch.stack(numbers))

    def read(self) -> Figures:
        """The numbers, which are waited for."""
        if self._sent is None:
            self.send()
        assert self._sent is not None
        numbers = self._sent.tolist()
        sums: dict[str, float] = defaultdict(float)
        for (name, _), amount in zip(self._metrics, numbers):  # added up in float64
            sums[name] += amount
        losses = numbers[len(self._metrics) :][: len(self.losses)]
        return Figures(dict(sums), losses, None if self.norm is None else numbers[-1])
