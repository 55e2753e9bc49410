"""Where PyTorch's random generators stand, so that what a dropout drew can be drawn once more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The state of PyTorch's generators on the host and, of a model on a GPU, on that device."""

    host: Tensor  # (bytes,) uint8
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """As the generators stand that a dropout on `device` draws from."""
        on_gpu = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None, device)

    def restore(self) -> None:
        """Go on drawing from here."""
        torch.set_rng_state(self.host)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextlib.contextmanager
def replay(state: RandomState | None) -> Iterator[None]:
    """Inside the block draw again what was drawn after `state`, then leave the generators as they were found.

    None: nothing was drawn, so nothing is done.
    """
    if state is None:
        yield
        return
    with torch.random.fork_rng([] if state.cuda is None else [state.device]):
        state.restore()
        yield
