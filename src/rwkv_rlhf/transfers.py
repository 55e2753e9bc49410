"""Copies between the host and a GPU that the host does not wait for.

A GPU works through a queue that the host fills. A host that reads a number of a tensor, or copies to or from memory
that is not pinned, waits until the queue is empty; then the GPU waits for the host. Where that may be is listed in
tests/support/allowed_waits.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; from the host to a GPU by way of pinned memory, behind what is queued there."""
    if not tensor.is_cpu or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetched:
    """Numbers of a tensor on their way to the host, behind what was queued on its device before."""

    def __init__(self, numbers: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.host = numbers.detach()
        if numbers.is_cuda:
            self.host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.host.copy_(numbers.detach(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[float]:
        """The numbers; waits for what was queued before them, and for nothing that was queued later."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found: list[float] = self.host.tolist()
        return found
