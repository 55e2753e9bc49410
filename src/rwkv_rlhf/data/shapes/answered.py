"""A question and its answer under two keys: prompt and completion, Alpaca, dolly, query and response, ..."""

from __future__ import annotations

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.messages import parse_messages
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Chat, Prompt, Record


def read(record: Record) -> list[Chat]:
    """One chat; the answer may be a list of messages too, which follow those of the question."""
    question, answer = record.facts.needs
    turns = question_turns(record, question)
    if not any(turn.role == "user" for turn in turns):
        key = record.key(question)
        raise RowError(f"{key} is empty", f"empty {key}")
    value = record.get(*answer)
    if isinstance(value, list):
        said = parse_messages(value, record.key(answer), record.notes)
    else:
        text = record.text(*answer)
        said = [Turn("assistant", text)] if text else []
    if not said:
        key = record.key(answer)
        raise RowError(f"{key} is empty", f"empty {key}")
    return [Chat(record.complete([*turns, *said]))]


def read_prompt(record: Record) -> list[Prompt]:
    """A question without an answer."""
    return [Prompt(record.asked(question_turns(record, record.facts.needs[0])))]
