"""The sequences that are sampled together: their tensors, and how rows leave, join and are gathered.

A row whose sequence has ended stays where it is until another one takes its place or too many are empty: a state is
megabytes, and copying all of them whenever one ends would cost more than running a few for nothing.

Legend: B rows, C width, M places for tokens of an answer, more as answers get longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.model.state import State
from rwkv_rlhf.transfers import to_device


class Scored(NamedTuple):
    """A token that might have come, and its log-probability."""

    token: int
    logprob: float


@dataclass
class Completion:
    """What was sampled after one prompt.

    Attributes:
        tokens: every sampled id, those of the stop included.
        logprobs: the natural-log probability of each under the model's own distribution at
            `params.scored_temperature` (no penalty, nothing cut), float32 precision.
        entropies: of the whole distribution at each token, at the same temperature, in nats; only with params.entropy.
        likeliest: at each token the `params.top_logprobs` likeliest ones, likeliest first, at the same temperature.
        finished: it stopped by itself, not at max_tokens and not because nobody wanted more of it.
        text: the decoded tokens before the stop; "" without a tokenizer.
        state: one row, what the model remembers after all tokens but the last; only with keep_state.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    likeliest: list[list[Scored]] = field(default_factory=list)
    finished: bool = False
    text: str = ""
    state: State | None = None


# (number of the sample, what it is so far: its last token is new) -> whether that sample is still wanted
Hear = Callable[[int, Completion], bool]


@dataclass
class Request:
    """A prompt that is to be continued `params.samples` times.

    prompt: ids, at least one. seed: of the first sample; sample n has seed + n. key: what the caller knows it by.
    state: one row, where the prompt begins; None = before any text. hear: is called with each token as it comes.
    keep: is called with the state (one row) behind the first `kept` tokens of the prompt, not all of it; 0 = never.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    key: Any = None
    state: State | None = None
    hear: Hear | None = None
    kept: int = 0
    keep: Callable[[State], None] | None = None


class Finished(NamedTuple):
    """Sample `copy` of a request is done."""

    request: Request
    copy: int
    completion: Completion


@dataclass
class Running:
    """One sequence that has not ended. tail: its last decoded bytes."""

    request: Request
    copy: int
    generator: torch.Generator = field(default_factory=torch.Generator)
    completion: Completion = field(default_factory=Completion)
    tail: bytes = b""


@dataclass
class Rows:
    """Row b of every tensor belongs to `sequences[b]`, None where that one has ended.

    Attributes:
        hidden: (B, C) after the last token. state: B rows.
        draws: (B, M) float64 in [0, 1), each row from the generator of its sequence. length: (B,) int64, tokens sampled
            so far.
        history: (B, M) int64 ids sampled so far. first: (B, M) bool, whether an id stands there for the first time.
            Both are kept for penalties only.
    """

    sequences: list[Running | None]
    hidden: Tensor
    state: State
    draws: Tensor
    history: Tensor
    first: Tensor
    length: Tensor

    @property
    def running(self) -> list[int]:
        """Rows whose sequence goes on."""
        return [row for row, sequence in enumerate(self.sequences) if sequence is not None]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer so far."""
        return max((len(one.completion.tokens) for one in self.sequences if one is not None), default=0)

    def by_params(self) -> dict[SamplingParams, list[int]]:
        """The running rows by how they are sampled."""
        found: dict[SamplingParams, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            if sequence is not None:
                found.setdefault(sequence.request.params, []).append(row)
        return found

    def select(self, rows: list[int]) -> Rows:
        """Some of the rows."""
        index = to_device(torch.tensor(rows), self.hidden.device)
        vectors = (self.hidden, self.draws, self.history, self.first, self.length)
        hidden, draws, history, first, length = (part.index_select(0, index) for part in vectors)
        sequences = [self.sequences[row] for row in rows]
        return Rows(sequences, hidden, self.state.select(index), draws, history, first, length)

    def with_places(self) -> Rows:
        """With places for a further token of each answer: where the longest has none, twice as many as before."""
        width = self.draws.shape[1]
        if self.longest < width:
            return self
        more = to_device(torch.cat([draws_of(one, width) for one in self.sequences]), self.draws.device)
        history, first = (functional.pad(part, (0, width)) for part in (self.history, self.first))
        draws = torch.cat([self.draws, more], 1)
        return Rows(self.sequences, self.hidden, self.state, draws, history, first, self.length)

    def joined(self, new: Rows) -> Rows:
        """With the rows of `new`, which has as many places: in the empty rows as far as there are any, then behind."""
        old = self
        places = [row for row, sequence in enumerate(old.sequences) if sequence is None][: len(new.sequences)]
        if places:
            target = to_device(torch.tensor(places), old.hidden.device)
            for mine, theirs in zip(old._tensors(), new._tensors(), strict=True):
                mine.index_copy_(0, target, theirs[: len(places)].to(mine.dtype))
            for place, sequence in zip(places, new.sequences):
                old.sequences[place] = sequence
        if len(places) == len(new.sequences):
            return old
        rest = [part[len(places) :] for part in new._tensors()]
        both = [torch.cat([mine, theirs]) for mine, theirs in zip(old._tensors(), rest, strict=True)]
        hidden, draws, history, first, length, *state = both
        sequences = [*old.sequences, *new.sequences[len(places) :]]
        return Rows(sequences, hidden, State.from_tensors(state), draws, history, first, length)

    def _tensors(self) -> list[Tensor]:
        return [self.hidden, self.draws, self.history, self.first, self.length, *self.state.tensors()]


def draws_of(sequence: Running | None, tokens: int) -> Tensor:
    """(1, tokens) float64 in [0, 1): the next draws of one sequence, zeros where it has ended."""
    if sequence is None:
        return torch.zeros(1, tokens, dtype=torch.float64)
    return torch.rand(1, tokens, generator=sequence.generator, dtype=torch.float64)
