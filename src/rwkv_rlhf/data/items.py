"""Documents, chats, pairs, rated answers and prompts out of any file that holds records, whatever shape they have."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import TOOLS
from rwkv_rlhf.data.messages import Notes
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import read_rows
from rwkv_rlhf.data.shapes.recognise import Recogniser
from rwkv_rlhf.data.shapes.record import Document, Item, Record
from rwkv_rlhf.data.sources import Source, sources_of
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.shapes import KINDS, SHAPES

# what examples of a kind are called when they are counted
UNITS = {"text": "chats", "pairs": "pairs", "rated": "answers", "prompts": "prompts"}

LOOKED_AT = 1000  # rows


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        shape: --format; "" = recognised. drop_thinking: --thinking drop. spare_reject: a pair's rejected answer may be
            absent. chosen: --train_on_chosen, pairs among text stand for chats with the chosen answer.
    """

    shape: str = ""
    drop_thinking: bool = False
    spare_reject: bool = False
    chosen: bool = False

    def __post_init__(self) -> None:
        if self.shape and self.shape not in SHAPES:
            raise ValueError(f"--format {self.shape} is not known; one of {', '.join(SHAPES)}")


class Found(NamedTuple):
    """One item, where its row stands, and the row's values by key."""

    where: str
    item: Item
    record: dict[str, Any]


@dataclass
class _Count:
    """Items of one shape in a file."""

    items: int = 0
    turns: list[int] = field(default_factory=lambda: [1 << 62, 0])  # of the shortest and the longest

    def add(self, item: Item) -> None:
        """One more."""
        self.items += 1
        if not isinstance(item, Document):
            turns = sum(1 for turn in item.turns if turn.role not in ("system", TOOLS))
            self.turns = [min(self.turns[0], turns), max(self.turns[1], turns)]

    def sentence(self, shape: str) -> str:
        """What was recognised: ShareGPT conversations, 9,914 chats of 2 to 14 turns."""
        facts, (least, most) = SHAPES[shape], self.turns
        if facts.kind == "text" and not most:
            return f"{facts.help} ({shape}), {self.items:,} of them"
        turns = f"{least}" if least == most else f"{least} to {most}"
        plural = "" if turns == "1" else "s"
        of = f"of {turns} turn{plural}" if facts.kind == "text" else f"after {turns} turn{plural}"
        return f"{facts.help} ({shape}), {self.items:,} {UNITS[facts.kind]} {of}"


def read_items(
    spec: str | os.PathLike[str], report: DataReport, kinds: Sequence[str], reading: Reading | None = None
) -> Iterator[Found]:
    """The items of all files that `spec` stands for; an item of a file with weight 2 comes twice, as the same object.

    Args:
        report: counts rows and skips; its `skip_bad` decides between an error and a counted skip.
        kinds: of KINDS in `settings/shapes.py`, those that the caller can use.

    Raises:
        ValueError: with file and line, what is wrong, or which shapes there are.
    """
    for source in sources_of(spec):
        copies = source.copies()
        for found in read_file(source, report, kinds, reading or Reading()):
            for _ in range(next(copies)):
                yield found


def read_file(source: Source, report: DataReport, kinds: Sequence[str], reading: Reading) -> Iterator[Found]:
    """The items of one file, each once; at its end `report.found` says what was recognised and what was not read."""
    assert set(kinds) <= KINDS.keys()
    notes, counts = Notes(reading.drop_thinking), dict[str, _Count]()
    recogniser = Recogniser(kinds, reading.shape, reading.spare_reject)
    readers = {name: load(facts.reader) for name, facts in SHAPES.items()}
    for where, values in read_rows(source.path, report):
        try:
            shape = recogniser.shape(values)
            record = Record(values, SHAPES[shape], notes, reading.spare_reject)
            items = readers[shape](record)
            record.note_unread()
        except RowError as error:
            report.bad(where, error)
            continue
        for item in items:
            counts.setdefault(shape, _Count()).add(item)
            yield Found(where, item, values)
    weight = "" if source.weight == 1 else f", each used {source.weight:g} times"
    for shape, count in counts.items():
        report.found.append(f"{source.path}: {count.sentence(shape)}{weight}")
    report.found += [f"{source.path}: {line}" for line in notes.lines()]


def kind_of_rows(path: str | os.PathLike[str], shape: str = "") -> str:
    """The kind of what the first usable row of a file holds, "" where none of the first LOOKED_AT is usable.

    Raises ValueError when the file cannot be read.
    """
    if shape:
        return SHAPES[Reading(shape).shape].kind
    recogniser = Recogniser(tuple(KINDS))
    rows = read_rows(path, DataReport(str(path), skip_bad=True, quiet=True))
    for _, values in itertools.islice(rows, LOOKED_AT):
        try:
            return SHAPES[recogniser.shape(values)].kind
        except RowError:
            continue
    return ""
