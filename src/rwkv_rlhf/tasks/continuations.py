"""How likely a model finds continuations of contexts, in batches; what contexts begin with alike runs once.

The memory of the model is its state: it is taken after a shared beginning and after each context, and forked to all
that follows. So a question with four answers runs once, and so does the introduction of all questions of a task.

Legend: B continuations, A tokens of all of them, C width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.data.grouping import group_by_tokens
from rwkv_rlhf.distributed.ranks import split_over_ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.model.packed import packed_rows
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.scoring.evaluation import evaluating
from rwkv_rlhf.transfers import to_device

ROW = 8192  # tokens that run together; what is longer runs alone, carried from piece to piece
PIECE = 4096
LEAST = 16  # tokens of a beginning that is worth a pass of its own
HEAD = 512  # rows of logits that exist at a time
STATE = 128  # tokens that a state counts as at least: it is megabytes, however short a question and its answers are

Ids = tuple[int, ...]


class Asked(NamedTuple):
    """Token ids: a context, at least one, and what may follow it."""

    context: Ids
    continuation: Ids


class Likelihood(NamedTuple):
    """Summed log-probability of a continuation's tokens in nats, and whether each was the likeliest one."""

    logp: float
    greedy: bool


class Group(NamedTuple):
    """A context, and the numbers of the requests that have it."""

    context: Ids
    numbers: list[int]


@torch.no_grad()
def likelihoods(model: RWKV, asked: Sequence[Asked]) -> list[Likelihood]:
    """Of each request, in their order. Several ranks share them out."""
    groups: dict[Ids, list[int]] = {}
    for number, one in enumerate(asked):
        assert one.context
        groups.setdefault(one.context, []).append(number)
    ordered = [Group(*found) for found in sorted(groups.items())]  # neighbours begin alike

    def size(group: Group) -> int:
        tokens = len(group.context) + sum(len(asked[number].continuation) for number in group.numbers)
        return max(tokens, STATE * len(group.numbers))

    batches = list(group_by_tokens(ordered, size, ROW))
    before = shared_state(model, [group.context for group in ordered])

    def scored(number: int) -> dict[int, Likelihood]:
        heartbeat(f"scoring batch {number} of an evaluation task")
        return _batch(model, batches[number], asked, before)

    with evaluating(model):
        found: dict[int, Likelihood] = {}
        for part in split_over_ranks(scored, len(batches), model):
            found |= part
    return [found[number] for number in range(len(asked))]


class Beginning(NamedTuple):
    """What all contexts begin with, and the state behind it (one row, None = before any text)."""

    ids: Ids
    state: State | None


def shared_state(model: RWKV, contexts: Sequence[Ids]) -> Beginning:
    """Of sorted contexts, where there are several and it is long enough. One token at least is left of each."""
    if len(contexts) < 2:
        return Beginning((), None)
    first, last = contexts[0], contexts[-1]  # what these two share, all share
    shared = tuple(one for one, _ in itertools.takewhile(lambda two: two[0] == two[1], zip(first, last)))
    shared = shared[: min(map(len, contexts)) - 1]
    if len(shared) < LEAST:
        return Beginning((), None)
    with evaluating(model):
        return Beginning(shared, _carried(model, shared, None))


def _ids(model: RWKV, ids: Sequence[int]) -> Tensor:
    return to_device(torch.tensor(ids, dtype=torch.int64), next(model.parameters()).device)


def _carried(model: RWKV, ids: Sequence[int], state: State | None) -> State | None:
    """The state after `ids` of any number."""
    for begin in range(0, len(ids), PIECE):
        state = model(_ids(model, ids[begin : begin + PIECE])[None], state)[1]
    return state


def _forked(model: RWKV, state: State | None, rows: Sequence[int]) -> State | None:
    return None if state is None else state.select(_ids(model, rows))


def _batch(model: RWKV, batch: list[Group], asked: Sequence[Asked], before: Beginning) -> dict[int, Likelihood]:
    """The likelihoods of all requests of some contexts. The last token of a context is the first input of each
    continuation, whose own last token is no input."""
    numbers = [number for group in batch for number in group.numbers]
    rest = [group.context[len(before.ids) : -1] for group in batch]
    if sum(map(len, rest)) > ROW:  # a single context, longer than what runs together
        (alone,) = rest
        state = _carried(model, alone, before.state)
    else:
        state = packed_rows(model, rest, _forked(model, before.state, [0] * len(batch))).after
    owner = [row for row, group in enumerate(batch) for _ in group.numbers]
    state = _forked(model, state, owner)
    inputs = [[*asked[number].context[-1:], *asked[number].continuation[:-1]] for number in numbers]
    inputs = [row if asked[number].continuation else [] for row, number in zip(inputs, numbers)]
    if sum(map(len, inputs)) > ROW:
        return _one_by_one(model, numbers, inputs, asked, state)
    hidden = packed_rows(model, inputs, state).hidden
    targets = [token for number in numbers for token in asked[number].continuation]
    return _summed(numbers, [*_scored(model, hidden, targets)], asked)


def _one_by_one(
    model: RWKV, numbers: Sequence[int], inputs: Sequence[list[int]], asked: Sequence[Asked], state: State | None
) -> dict[int, Likelihood]:
    """Continuations that are too long to run together, each in pieces."""
    found: dict[int, Likelihood] = {}
    for row, number in enumerate(numbers):
        own, scores = None if state is None else state.row(row), list[Likelihood]()
        for begin in range(0, len(inputs[row]), PIECE):
            piece = slice(begin, begin + PIECE)
            hidden, own = model(_ids(model, inputs[row][piece])[None], own)
            scores += _scored(model, hidden[0], asked[number].continuation[piece])
        found |= _summed([number], scores, asked)
    return found


def _scored(model: RWKV, hidden: Tensor, targets: Sequence[int]) -> Iterator[Likelihood]:
    """Of each target alone; hidden (A, C), A targets."""
    wanted = _ids(model, targets)
    for begin in range(0, len(targets), HEAD):
        piece = slice(begin, begin + HEAD)
        logits = model.head(hidden[piece]).float()
        logp = logits.gather(1, wanted[piece, None])[:, 0] - torch.logsumexp(logits, 1)
        greedy = logits.argmax(1) == wanted[piece]
        yield from map(Likelihood, logp.tolist(), greedy.tolist())


def _summed(numbers: Sequence[int], tokens: Sequence[Likelihood], asked: Sequence[Asked]) -> dict[int, Likelihood]:
    """The tokens' likelihoods, which lie one continuation behind the other, as those of whole continuations."""
    found, at = {}, 0
    for number in numbers:
        own = tokens[at : at + len(asked[number].continuation)]
        at += len(own)
        found[number] = Likelihood(sum(one.logp for one in own), all(one.greedy for one in own))
    return found
