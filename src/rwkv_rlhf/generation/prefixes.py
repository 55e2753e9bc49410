"""States after texts that many prompts begin with, such as a system text: they run once.

A state is megabytes, whatever its text's length, so only beginnings that were asked for are kept, and of those perhaps
only the ones that were used last.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.transfers import to_device

LEAST = 16  # tokens of a beginning that is worth a pass of its own


class Rest(NamedTuple):
    """What of a prompt is still to run, and the state (one row) where that begins; None = before any text."""

    prompt: Sequence[int]
    state: State | None


class PrefixCache:
    """States of one model after beginnings of prompts, `most` of them (0 = all); for several threads.

    Empty it when the model's weights change.
    """

    def __init__(self, model: RWKV, most: int = 0) -> None:
        self.model, self.most = model, most
        self._states: dict[tuple[int, ...], State] = {}  # the one used last stands last
        self._lock = threading.Lock()

    def add(self, beginning: Sequence[int], state: State) -> None:
        """Keep the state (one row) after some ids; where there are too many, the one goes that was not used longest."""
        with self._lock:
            self._states.pop(tuple(beginning), None)
            self._states[tuple(beginning)] = state
            while self.most and len(self._states) > self.most:
                del self._states[next(iter(self._states))]

    @torch.no_grad()
    def add_common(self, prompts: Sequence[Sequence[int]]) -> int:
        """Run what all `prompts` begin with, if there are several and it is long enough; gives its tokens, or 0.

        One token at least is left of each.
        """
        if len(prompts) < 2:
            return 0
        first, last = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all share
        shared = [one for one, other in itertools.takewhile(lambda two: two[0] == two[1], zip(first, last))]
        shared = shared[: min(map(len, prompts)) - 1]
        if len(shared) < LEAST:
            return 0
        if tuple(shared) not in self._states:
            before = self.find([*shared, 0])
            device = next(self.model.parameters()).device
            tokens = to_device(torch.tensor([list(before.prompt)[:-1]], dtype=torch.int64), device)
            state = self.model(tokens, before.state)[1] if tokens.numel() else before.state
            assert state is not None
            self.add(shared, state)
        return len(shared)

    def find(self, prompt: Sequence[int]) -> Rest:
        """The prompt behind the longest beginning that is known; at least one token of it."""
        with self._lock:
            for size in sorted({len(known) for known in self._states if len(known) < len(prompt)}, reverse=True):
                beginning = tuple(prompt[:size])
                state = self._states.pop(beginning, None)
                if state is not None:
                    self._states[beginning] = state
                    return Rest(prompt[size:], state)
        return Rest(prompt, None)
