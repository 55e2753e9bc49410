"""What is asked in a row: a text, a text with more keys joined to it, messages, or a transcript."""

from __future__ import annotations

from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.messages import parse_messages
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.record import Record
from rwkv_rlhf.data.transcripts import holds_speakers, split_transcript
from rwkv_rlhf.settings.shapes import Names


def question_turns(record: Record, names: Names) -> list[Turn]:
    """The turns under one of these keys, with `history` before and the texts of `joins` behind; none where it is empty.

    RowError for what is neither text nor a list of messages.
    """
    value, key = record.get(*names), record.key(names)
    if isinstance(value, list):
        return parse_messages(value, key, record.notes)
    if not isinstance(value, str | None):
        raise RowError(f"{key} must be text or a list of messages, not {type(value).__name__}", "unreadable")
    parts = [normalise(value or ""), *(record.text(name) for name in record.facts.joins)]
    text = normalise("\n\n".join(part for part in parts if part))
    before = history_turns(record)
    if not text:
        return before
    return [*before, *user_turns(text, key, record)]


def user_turns(text: str, key: str, record: Record) -> list[Turn]:
    """A text as one turn of the user, or as the turns of the transcript that it is."""
    turns = split_transcript(text)
    if turns is not None and turns[-1].role == "user":
        record.notes.remarks[f"had the speakers' names in {key}: split into turns"] += 1
        return turns
    if holds_speakers(text):
        record.notes.speakers(key, text)
    return [Turn("user", text)]


def history_turns(record: Record) -> list[Turn]:
    """The turns of `history`, a list of [question, answer]."""
    value = record.get("history")
    turns: list[Turn] = []
    if value is None:
        return turns
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RowError("history must be a list of [question, answer]", "unreadable")
    for question, answer in value:
        if not isinstance(question, str) or not isinstance(answer, str):
            raise RowError("history must hold texts", "unreadable")
        turns += [Turn("user", normalise(question)), Turn("assistant", normalise(answer))]
    if not all(turn.text for turn in turns):
        raise RowError("history has an empty turn", "empty history")
    return turns
