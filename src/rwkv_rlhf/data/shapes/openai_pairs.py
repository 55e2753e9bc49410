"""OpenAI's preference pairs: {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": ...}."""

from __future__ import annotations

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.messages import parse_messages, tools_turn
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.answer import parse_answer
from rwkv_rlhf.data.shapes.preference import make_pair
from rwkv_rlhf.data.shapes.record import Pair, Record


def read(record: Record) -> list[Pair]:
    """One pair; tools and messages stand inside `input`."""
    asked = record.get("input")
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
        raise RowError('input must be {"messages": [...]}', "unreadable")
    turns: list[Turn] = parse_messages(asked["messages"], "input.messages", record.notes)
    record.notes.unread.update(f"input.{key}" for key in asked.keys() - {"messages", "tools"})
    chosen, reject = (parse_answer(record, names) for names in record.facts.needs[1:])
    if chosen.before or reject.before:
        raise RowError("preferred_output and non_preferred_output must be one message each", "unreadable")
    return [make_pair(record, [*tools_turn(asked.get("tools")), *turns], chosen.text, reject.text)]
