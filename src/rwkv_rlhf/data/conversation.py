"""Conversations as text: turns with a role, normalised, as the rows of data files hold them."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv_rlhf.data.report import RowError

ROLES = ("system", "user", "assistant")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


class Turn(NamedTuple):
    """What one speaker says; the role is one of ROLES."""

    role: str
    text: str


def normalise(text: str) -> str:
    """Strips, turns CRLF and CR into LF, and runs of blank lines into one newline.

    A blank line ends a turn in every template of the tradition, so none may stand inside one.
    """
    return _BLANK_LINES.sub("\n", text.replace("\r\n", "\n").replace("\r", "\n").strip())


def parse_messages(messages: list[Any], name: str) -> list[Turn]:
    """Turns of a list of {role, content}; RowError names the list (`name`) and the message that is wrong."""
    turns = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RowError(f"{name}: message {number} has the role {role!r}; one of {', '.join(ROLES)}", "unreadable")
        text = message.get("content")
        if not isinstance(text, str):
            raise RowError(f"{name}: message {number} has no text under content", "unreadable")
        text = normalise(text)
        if text:
            turns.append(Turn(role, text))
        elif role != "system":
            raise RowError(f"{name}: message {number} is empty", f"empty {role} message")
    return turns


def with_system(turns: list[Turn], system: object) -> list[Turn]:
    """The turns with the text of an optional column `system` in front, unless they begin with such a turn."""
    if not isinstance(system, str) or not normalise(system) or (turns and turns[0].role == "system"):
        return turns
    return [Turn("system", normalise(system)), *turns]


def refuse_nul(turns: Sequence[Turn]) -> None:
    """RowError for a NUL byte: it is text for no model, and usually a file of another encoding."""
    for role, text in turns:
        if "\0" in text:
            raise RowError(f"a text of the {role} holds a NUL byte: is the file UTF-16, or binary?", "NUL byte")
