"""Samples of several documents, and samples that grow longer while training begins.

A sample is a list of text examples that are run as one row. Joined documents keep the zero state at their starts, or,
glued, become one document.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rwkv_rlhf.data.batch import TextExample, glue


class Documents(Protocol):
    """Text examples whose sizes are known without reading them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TextExample: ...
    def trained(self, index: int) -> int: ...
    def length(self, index: int) -> int: ...


class JoinedDocuments:
    """Up to `documents` neighbouring examples joined to one sample of at most ctx_len inputs.

    The tradition's --infctx_dataset_multiplier, which cut off what went beyond ctx_len; here the sample ends before the
    document that does not fit, and that document begins the next one, so nothing is lost.

    Args:
        examples: none longer than ctx_len inputs (the readers cut them).
        seed: of the order in which neighbours are chosen; None = the file's order.
        reset_state: False glues a sample's documents into one; the first token of a later one is then a target.
    """

    def __init__(
        self, examples: Documents, documents: int, ctx_len: int, seed: int | None = None, reset_state: bool = True
    ):
        self.examples, self.reset_state = examples, reset_state
        count = len(examples)
        self._order = np.arange(count) if seed is None else np.random.default_rng([seed, documents]).permutation(count)
        self._starts, held = [0], 0
        for at, index in enumerate(self._order.tolist()):
            length = examples.length(index)
            inputs = length - 1 if reset_state else length
            # glued, every document but the first adds an input for its first token
            if at > self._starts[-1] and (at - self._starts[-1] == documents or held + inputs > ctx_len):
                self._starts.append(at)
                held = 0
            held += inputs if at > self._starts[-1] else length - 1
        self._starts.append(count)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def indices(self, index: int) -> list[int]:
        """Which examples make the sample."""
        return [int(i) for i in self._order[self._starts[index] : self._starts[index + 1]]]

    def __getitem__(self, index: int) -> list[TextExample]:
        parts = [self.examples[i] for i in self.indices(index)]
        return parts if self.reset_state else [glue(parts)]

    def trained(self, index: int) -> int:
        """Trained targets of a sample."""
        if not self.reset_state:
            return self[index][0].trained()
        return sum(self.examples.trained(i) for i in self.indices(index))


class ContextWarmup:
    """Samples grow from `first` inputs to `last`, in a straight line over the first `steps` optimizer steps.

    A function of the step's number alone, so a run that goes on from a save has the length that it would have had.
    """

    def __init__(self, first: int, last: int, steps: int):
        self.first, self.last, self.steps = first, last, steps

    def __call__(self, step: int) -> int:
        """Most inputs of a sample at an optimizer step."""
        return self.first + (self.last - self.first) * min(step, self.steps) // self.steps

    def done(self, step: int) -> bool:
        """Whether samples have their full length from this step on."""
        return step >= self.steps


def shorten(sample: Sequence[TextExample], inputs: int) -> list[TextExample]:
    """The first `inputs` inputs of a sample; documents that begin later are left out."""
    kept = []
    for example in sample:
        if inputs < 1:
            break
        kept.append(example.first(inputs + 1))
        inputs -= len(kept[-1].tokens) - 1
    return kept
