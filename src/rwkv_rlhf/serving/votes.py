"""What a person said of pairs of answers: a log of all votes, and beside it the preference pairs that they make.

OUT.votes is the truth: its first line says of which models and prompts, and each vote is a line that is on the disk
before the next pair is shown. OUT holds the pairs for train.py, and is made of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.shapes.record import Pair
from rwkv_rlhf.data.shapes.stable import stable_form
from rwkv_rlhf.files import AppendLog, Lines, OtherHead, check_writable, parse_json

LEFT, RIGHT, TIE, BAD, SKIP, EDIT_LEFT, EDIT_RIGHT = "left", "right", "tie", "bad", "skip", "edit_left", "edit_right"
KINDS = (LEFT, RIGHT, TIE, BAD, SKIP, EDIT_LEFT, EDIT_RIGHT)
NORMAL_95 = 1.959963984540054  # the 97.5th percentile of the normal distribution


@dataclass(frozen=True)
class Vote:
    """What was said of one pair.

    number: of the prompt. answers: as they were shown, left and right. models: which of the models gave each.
    kind: one of KINDS. edited: the person's own words in place of the left or right answer.
    """

    number: int
    turns: tuple[Turn, ...]
    answers: tuple[str, str]
    models: tuple[int, int]
    kind: str
    edited: str = ""
    when: int = field(default_factory=lambda: int(time.time()))

    def pair(self) -> Pair | None:
        """The preference that it means, None for none. Raises ValueError for one that nobody could learn from."""
        left, right = map(normalise, self.answers)
        edited = normalise(self.edited)
        made = {
            LEFT: (left, right),
            RIGHT: (right, left),
            EDIT_LEFT: (edited, left),
            EDIT_RIGHT: (edited, right),
        }.get(self.kind)
        if made is None:
            return None
        chosen, reject = made
        if not (chosen and reject):
            raise ValueError("an answer is empty: say tie, both bad or skip")
        if chosen == reject:
            raise ValueError("both answers are the same: say tie, both bad or skip")
        return Pair(self.turns, chosen, reject)

    @classmethod
    def read(cls, said: dict[str, Any]) -> Vote:
        """The inverse of `dataclasses.asdict`, through JSON."""
        turns = tuple(Turn(role, text) for role, text, *_ in said["turns"])
        left, right = said["answers"]
        return cls(
            number=said["number"],
            turns=turns,
            answers=(str(left), str(right)),
            models=(said["models"][0], said["models"][1]),
            kind=said["kind"],
            edited=said["edited"],
            when=said["when"],
        )


class Rate(NamedTuple):
    """Of `votes` that name a better answer, the share that one model won, and its 95% interval (Wilson, 1927)."""

    wins: int
    votes: int
    share: float
    low: float
    high: float


def win_rate(wins: int, votes: int) -> Rate:
    """The score interval of Wilson (Journal of the American Statistical Association 22, 1927): with p = wins / votes,

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    if not votes:
        return Rate(0, 0, 0.5, 0.0, 1.0)
    z, share = NORMAL_95, wins / votes
    centre = share + z * z / (2 * votes)
    half = z * math.sqrt(share * (1 - share) / votes + z * z / (4 * votes * votes))
    whole = 1 + z * z / votes
    return Rate(wins, votes, share, max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole))


class VoteFile:
    """OUT with its OUT.votes, opened to go on. Raises ValueError when they belong to other models or prompts.

    Attributes:
        votes: in order, those taken back left out. typed: conversations that were asked in the page.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        head = (json.dumps(about, sort_keys=True) + "\n").encode()
        self.log = AppendLog(path.with_name(f"{path.name}.votes"), Lines(), head)
        self.pairs = AppendLog(path, Lines())
        self.votes: list[Vote] = []
        self.typed: list[tuple[Turn, ...]] = []
        check_writable(path)
        try:
            there = self.log.resume()
        except OtherHead as other:
            raise ValueError(self._differs(other.head)) from other
        if there:
            self._read()
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is there, and no {self.log.path.name} that says whose it is: give another name")
        else:
            self.log.begin()
        self._write_pairs()

    def _differs(self, head: bytes) -> str:
        try:
            was = parse_json(head)
            names = [name for name, value in self.about.items() if was.get(name) != value]
        except (ValueError, AttributeError):
            names = []
        differ = f" (other {', '.join(names)})" if names else ""
        return f"{self.log.path} holds votes of another work{differ}: give another --output, or the same flags"

    def _read(self) -> None:
        for line in self.log.records():
            try:
                said = parse_json(line)
                if "undo" in said:
                    self.votes.pop()
                elif "asked" in said:
                    self.typed.append(tuple(Turn(role, text) for role, text, *_ in said["asked"]))
                else:
                    self.votes.append(Vote.read(said))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{self.log.path} is damaged ({error}): {line[:80]!r}") from error
        self.log.keep()

    def _write_pairs(self) -> None:
        """Makes OUT what the votes say."""
        wanted = b"".join(_line(stable_form(pair)) for vote in self.votes if (pair := vote.pair()))
        if not self.path.exists() or self.path.read_bytes() != wanted:
            self.pairs.begin(wanted)  # where a vote was taken back, or a kill fell between the two files

    def add(self, vote: Vote) -> None:
        """One more vote, on the disk when this returns. Raises ValueError for one that makes no pair and should."""
        pair = vote.pair()
        self.log.append(_line(dataclasses.asdict(vote)))
        self.votes.append(vote)
        if pair is not None:
            self.pairs.append(_line(stable_form(pair)))

    def undo(self) -> Vote:
        """Takes the last vote back. Raises ValueError when there is none."""
        if not self.votes:
            raise ValueError("there is no vote to take back")
        self.log.append(_line({"undo": 1}))
        vote = self.votes.pop()
        self._write_pairs()
        return vote

    def ask(self, turns: Sequence[Turn]) -> None:
        """Keeps a conversation that was typed."""
        self.log.append(_line({"asked": turns}))
        self.typed.append(tuple(turns))

    def made(self) -> int:
        """Preference pairs so far."""
        return sum(1 for vote in self.votes if vote.pair() is not None)

    def rate(self) -> Rate:
        """How often the first model's answer was better than the second's; ties, both bad and edits are left out."""
        sides = {LEFT: 0, RIGHT: 1}
        better = [vote.models[sides[vote.kind]] for vote in self.votes if vote.kind in sides]
        return win_rate(sum(1 for model in better if model == 0), len(better))


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")
