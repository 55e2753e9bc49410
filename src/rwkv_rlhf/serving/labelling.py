"""Which pair of answers is shown next: answers are sampled ahead of the person who compares them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.serving.answering import pieces
from rwkv_rlhf.serving.engine import Cue, Engine
from rwkv_rlhf.serving.votes import KINDS, SKIP, Rate, Vote, VoteFile
from rwkv_rlhf.settings.counted import counted

TRIES = 4  # for a pair of which one is empty, or that says the same twice


@dataclass
class Item:
    """A prompt with its two answers, left and right.

    Attributes:
        models: which model gives each. texts, done: the answers so far, and whether they are whole.
        error: why there are none. version: counts changes; `changed` is set at each.
    """

    number: int
    turns: tuple[Turn, ...]
    models: tuple[int, int] = (0, 0)
    texts: list[str] = field(default_factory=lambda: ["", ""])
    done: list[bool] = field(default_factory=lambda: [False, False])
    error: str = ""
    version: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        """Whether both answers are there."""
        return all(self.done)

    def tell(self) -> None:
        """Something changed."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def shown(self) -> dict[str, Any]:
        """What the page may know: not which model says what."""
        return {"item": self.number, "texts": self.texts, "done": self.done, "error": self.error}


class Labelling:
    """The work of one person: prompts of a file and typed ones, typed ones first.

    engines: one model that answers twice, or two that are compared. ahead: prompts whose answers are sampled meanwhile.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        template: Template,
        params: SamplingParams,
        prompts: Sequence[tuple[Turn, ...]],
        votes: VoteFile,
        ahead: int,
    ) -> None:
        self.engines, self.template, self.params = engines, template, params
        self.prompts, self.votes, self.ahead = prompts, votes, ahead
        self.items: dict[int, Item] = {}

    def pending(self) -> list[int]:
        """Numbers of the prompts without a vote, in the order in which they come."""
        voted = {vote.number for vote in self.votes.votes}
        typed = range(len(self.prompts), len(self.prompts) + len(self.votes.typed))
        return [number for number in (*typed, *range(len(self.prompts))) if number not in voted]

    def turns(self, number: int) -> tuple[Turn, ...]:
        """The conversation of a prompt."""
        count = len(self.prompts)
        return self.prompts[number] if number < count else self.votes.typed[number - count]

    def current(self) -> Item | None:
        """What is to be compared now, None when nothing is left; sampling of the next ones begins."""
        pending = self.pending()[: 1 + self.ahead]
        for number in pending:
            if number not in self.items:
                item = self.items[number] = Item(number, self.turns(number))
                item.task = asyncio.get_running_loop().create_task(self._sample(item))
        return self.items[pending[0]] if pending else None

    def cue(self, turns: Sequence[Turn]) -> Cue:
        """What the answers follow. Raises RowError where the template refuses the conversation."""
        return Cue.of(turns, self.template, self.engines[0].tokenizer)

    async def _sample(self, item: Item) -> None:
        """Two answers of which neither is empty and that differ, if a few tries give some."""
        try:
            cue = self.cue(item.turns)
        except ValueError as error:
            item.error = str(error)
            item.tell()
            return
        two = len(self.engines) == 2
        order = random.Random(f"{self.params.seed} {item.number}").sample((0, 1), 2)
        item.models = (order[0], order[1]) if two else (0, 0)
        for attempt in range(TRIES):
            item.texts, item.done, item.error = ["", ""], [False, False], ""
            item.tell()
            seed = sequence_seed(sequence_seed(self.params.seed, item.number), attempt)
            await asyncio.gather(*(self._answer(item, side, order[side], cue, seed) for side in (0, 1)))
            left, right = map(normalise, item.texts)
            if item.error or (left and right and left != right):
                return

    async def _answer(self, item: Item, side: int, which: int, cue: Cue, seed: int) -> None:
        engine = self.engines[which if len(self.engines) == 2 else 0]
        async for piece in pieces(engine, cue, self.params, seed + which):
            item.texts[side] += piece.text
            item.done[side] = piece.done is not None
            item.error = item.error or piece.error
            item.tell()

    def vote(self, number: int, kind: str, edited: str) -> None:
        """What the person says of the current pair, on the disk when this returns. Raises ValueError."""
        item = self.current()
        if item is None or item.number != number:
            raise ValueError("this pair has its vote already; reload the page")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        if not item.whole and kind != SKIP:
            raise ValueError("the answers are not whole yet")
        left, right = item.texts
        self.votes.add(Vote(number, item.turns, (left, right), item.models, kind, edited))
        if item.task is not None and not item.whole:
            item.task.cancel()
        self.items.pop(number)

    def undo(self) -> None:
        """Takes the last vote back: its pair comes again. Raises ValueError when there is none."""
        vote = self.votes.undo()
        item = Item(vote.number, vote.turns, vote.models, [*vote.answers], [True, True])
        if not any(vote.answers):  # it was skipped before there was an answer
            return
        self.items[vote.number] = item

    def ask(self, turns: tuple[Turn, ...]) -> None:
        """A conversation that was typed; it comes next. Raises RowError where the template refuses it."""
        self.cue(turns)
        self.votes.ask(turns)

    def progress(self) -> dict[str, Any]:
        """Counts for the page."""
        return {
            "votes": len(self.votes.votes),
            "pairs": self.votes.made(),
            "left": len(self.pending()),
            "compared": len(self.engines) == 2,
        }

    def lines(self, names: Sequence[str]) -> list[str]:
        """What came of it, in sentences."""
        kinds = [vote.kind for vote in self.votes.votes]
        counts = ", ".join(f"{kinds.count(kind)} {kind.replace('_', ' ')}" for kind in KINDS if kind in kinds)
        out = [counted(len(kinds), "vote") + (f" ({counts})" if counts else ""), counted(self.votes.made(), "pair")]
        if len(names) == 2:
            out.append(f"{names[0]} was better than {names[1]} in {win_sentence(self.votes.rate())}")
        return out


def win_sentence(rate: Rate) -> str:
    """In how many pairs one model won, with its interval; without any that is decided there is nothing to tell."""
    if not rate.votes:
        return "no pair so far: none is decided"
    interval = f"95% interval {rate.low:.0%} to {rate.high:.0%}"
    return f"{rate.wins} of {counted(rate.votes, 'decided pair')}: {rate.share:.0%} ({interval})"
