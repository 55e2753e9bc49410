"""One row of a file by its keys, and what a reader makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import Turn, check_order, is_missing, normalise, refuse_nul, with_system
from rwkv_rlhf.data.messages import Notes, parse_messages, tools_turn
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.settings.shapes import SYSTEM, Names, ShapeFacts


class Document(NamedTuple):
    """Text to be learnt byte for byte."""

    text: str


class Chat(NamedTuple):
    """A conversation."""

    turns: tuple[Turn, ...]


class Pair(NamedTuple):
    """A conversation and two answers to it, as normalised text; their scores where the file has some. The rejected
    answer may be "" for who asked for that. margin: by how much the row says that the chosen answer is better."""

    turns: tuple[Turn, ...]
    chosen: str
    reject: str
    scores: tuple[float | None, float | None] = (None, None)
    margin: float | None = None


class Rated(NamedTuple):
    """A conversation and one answer, good or not."""

    turns: tuple[Turn, ...]
    completion: str
    good: bool


class Prompt(NamedTuple):
    """A conversation that waits for an answer."""

    turns: tuple[Turn, ...]


MEDIA = ("image", "images", "audio", "audios", "video", "videos")
Item = Document | Chat | Pair | Rated | Prompt


class Record:
    """The values of a row by key (in lower case).

    Attributes:
        facts: those of the shape that it is read as. read: keys that were asked for.
        spare: whether the rejected answer may be absent.
    """

    def __init__(self, values: dict[str, Any], facts: ShapeFacts, notes: Notes, spare: bool = False) -> None:
        self.values, self.facts, self.notes, self.spare = values, facts, notes, spare
        self.read: set[str] = set()

    def get(self, *names: str) -> Any:
        """The value under one of these keys, None where it is missing. RowError for two keys that say two things."""
        self.read.update(names)
        there = [name for name in names if name in self.values]
        found = {name: self.values[name] for name in there if not is_missing(self.values[name])}
        first = next(iter(found.values()), None)
        for name, value in found.items():
            if value != first:
                raise RowError(f"{next(iter(found))} and {name} say two things: keep one of the two", "two values")
        return first

    def key(self, names: Names) -> str:
        """The one of these keys that the row has, or the first of them, for messages."""
        return next((name for name in names if name in self.values), names[0])

    def text(self, *names: str) -> str:
        """The normalised text under one of these keys, "" where it is missing. RowError for what is no text."""
        value = self.get(*names)
        if not isinstance(value, str | None):
            raise RowError(f"{self.key(names)} must be text, not {type(value).__name__}", "unreadable")
        return normalise(value or "")

    def turns(self, names: Names) -> list[Turn]:
        """The turns of a list of messages under one of these keys."""
        return parse_messages(self.get(*names), self.key(names), self.notes)

    def complete(self, turns: list[Turn]) -> tuple[Turn, ...]:
        """The turns behind the row's system text and tools. RowError for an order that is none."""
        turns = with_system(turns, self.get(*SYSTEM))
        turns = [*tools_turn(self.get("tools")), *turns]
        check_order(turns)
        refuse_nul(turns)
        return tuple(turns)

    def asked(self, turns: list[Turn]) -> tuple[Turn, ...]:
        """As `complete`, of a prompt; RowError when no user speaks in it, or when it is answered already."""
        if not any(turn.role == "user" for turn in turns):
            raise RowError("the prompt is empty", "empty prompt")
        if turns[-1].role == "assistant":
            raise RowError("the prompt ends with the assistant's words: an answer must follow the user's", "answered")
        return self.complete(turns)

    def note_unread(self) -> None:
        """Counts the keys that hold something and that nobody asked for. RowError for pictures or sound among them."""
        unread = [key for key, value in self.values.items() if key not in self.read and not is_missing(value)]
        for key in unread:
            if key in MEDIA:
                raise RowError(f"the row has {key}: only text is read", f"{key} beside the text")
        self.notes.unread.update(unread)
