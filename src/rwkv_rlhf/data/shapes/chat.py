"""Whole chats as lists of messages: OpenAI's `messages`, ShareGPT's `conversations`."""

from __future__ import annotations

from rwkv_rlhf.data.shapes.record import Chat, Record


def read(record: Record) -> list[Chat]:
    """One chat."""
    return [Chat(record.complete(record.turns(record.facts.needs[0])))]
