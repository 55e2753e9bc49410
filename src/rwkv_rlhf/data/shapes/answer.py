"""One answer of a row: a text, a message, or a list of messages whose last one is the answer."""

from __future__ import annotations

from typing import NamedTuple

from rwkv_rlhf.data.conversation import Turn, is_missing, normalise
from rwkv_rlhf.data.messages import parse_messages
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.record import Record
from rwkv_rlhf.settings.shapes import REJECT, Names


class ParsedAnswer(NamedTuple):
    """An answer as text, and the turns before it where a list of messages holds them."""

    before: list[Turn]
    text: str


def parse_answer(record: Record, names: Names, need: bool = True) -> ParsedAnswer:
    """The answer under one of these keys.

    Raises RowError for what is no answer, and for one that is missing or empty if there must be one (`need`).
    """
    name, value = names[0], record.get(*names)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        turns = parse_messages(value, name, record.notes)
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{name}: the last message must be the assistant's", "unreadable")
        return ParsedAnswer(turns[:-1], turns[-1].text)
    there = any(not is_missing(record.values.get(n)) or isinstance(record.values.get(n), str) for n in names)
    if need and value is None and not there:
        raise RowError(f"{name} is missing", f"missing {name}")
    if not isinstance(value, str | None):
        raise RowError(f"{name} must be text or a list of messages, not {type(value).__name__}", "unreadable")
    text = normalise(value or "")
    if need and not text:
        more = "; rlhf_generate_reject_csv.py samples rejects" if names == REJECT else ""
        raise RowError(f"the answer {name} is empty{more}", f"empty {name}")
    return ParsedAnswer([], text)
