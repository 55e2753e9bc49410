"""Held-out examples: a seeded split that keeps segments of one document and pairs of one prompt on the same side."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from rwkv_rlhf.data.batch import PairExample, TextExample
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.data.text.cut_documents import CutDocuments

Example = TextExample | PairExample | PromptExample


class Grouped(Protocol):
    """Examples of which some belong together."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...
    def trained(self, index: int) -> int: ...
    def group(self, index: int) -> object: ...


class Subset:
    """Some of the examples of another collection, in the order of `indices`."""

    def __init__(self, examples: Grouped, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[self.indices[index]]

    def __iter__(self) -> Iterator[Example]:
        return (self.examples[index] for index in self.indices)

    def trained(self, index: int) -> int:
        """Trained targets of an example."""
        return self.examples.trained(self.indices[index])

    def length(self, index: int) -> int:
        """Tokens of an example of text."""
        assert isinstance(self.examples, CutDocuments)
        return self.examples.length(self.indices[index])


def split(examples: Grouped, share: float, seed: int) -> tuple[Subset, Subset]:
    """(training, held out) parts of `examples`, of which about `share` (0 < share < 1) is held out.

    Raises ValueError when there is only one group (document or prompt), which cannot be on both sides.
    """
    assert 0 < share < 1
    groups: dict[object, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(examples.group(index), []).append(index)
    if len(groups) < 2:
        raise ValueError("--val_split needs at least two documents or prompts; there is one")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held = share * len(examples), 0
    taken = 0
    while taken < len(order) - 1 and (taken == 0 or held + len(order[taken]) <= wanted):
        held += len(order[taken])
        taken += 1
    out = sorted(index for group in order[:taken] for index in group)
    kept = sorted(index for group in order[taken:] for index in group)
    return Subset(examples, kept), Subset(examples, out)
