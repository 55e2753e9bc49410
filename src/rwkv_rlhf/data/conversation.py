"""Conversations as text: turns with a role, normalised, as every template gets them."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_rlhf.data.report import RowError

TOOLS = "tools"  # the role of a turn that lists, as JSON, the tools that may be called
ROLES = ("system", "user", "assistant", "tool", TOOLS)
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_MISSING = ("", "NaN", "nan")  # what a table has where nobody wrote anything


class Turn(NamedTuple):
    """What one speaker says; the role is one of ROLES. trained: what the assistant says here may be learnt."""

    role: str
    text: str
    trained: bool = True


def normalise(text: str) -> str:
    """Strips, turns CRLF and CR into LF, and runs of blank lines into one newline.

    A blank line ends a turn in every template of the tradition, so none may stand inside one.
    """
    return _BLANK_LINES.sub("\n", text.replace("\r\n", "\n").replace("\r", "\n").strip())


def is_missing(value: object) -> bool:
    """Whether a value says that there is none: None, NaN (also as text), white space, an empty list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == [] or (isinstance(value, str) and value.strip() in _MISSING)


def with_system(turns: list[Turn], system: object) -> list[Turn]:
    """The turns with the text of an optional key `system` in front.

    Raises RowError for a `system` that is no text, and for one that the turns begin with another of.
    """
    if is_missing(system):
        return turns
    if not isinstance(system, str):
        raise RowError(f"system must be text, not {type(system).__name__}", "unreadable")
    new = Turn("system", normalise(system))
    first = next((turn for turn in turns if turn.role == "system"), None)
    if first is not None:
        if first.text != new.text:
            raise RowError("the key system and the system message differ: keep one of the two", "two systems")
        return turns
    return [new, *turns]


def check_order(turns: Sequence[Turn]) -> None:
    """RowError for a conversation with two system texts, or one that the assistant begins."""
    systems = [turn for turn in turns if turn.role == "system"]
    if len(systems) > 1:
        raise RowError("two system messages: join them into one", "two systems")
    first = next((turn.role for turn in turns if turn.role not in ("system", TOOLS)), "user")
    if first != "user":
        raise RowError(f"the {first} speaks first: a conversation begins with the user", f"{first} first")


def refuse_nul(turns: Sequence[Turn]) -> None:
    """RowError for a NUL byte: it is text for no model, and usually a file of another encoding."""
    for turn in turns:
        if "\0" in turn.text:
            raise RowError(f"a text of the {turn.role} holds a NUL byte: is the file UTF-16, or binary?", "NUL byte")
