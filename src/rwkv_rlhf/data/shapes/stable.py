"""The form in which this program writes data: what it reads without recognising anything."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rwkv_rlhf.data.conversation import TOOLS, Turn
from rwkv_rlhf.data.shapes.record import Chat, Document, Item, Pair, Rated

_THOUGHT = re.compile(r"<think>\n?(.*?)\n?</think>\n?(.*)", re.DOTALL)


def stable_form(item: Item) -> dict[str, Any]:
    """An item as one JSON object; reading that object gives the item again."""
    match item:
        case Document():
            return {"text": item.text}
        case Chat():
            return _messages(item.turns)
        case Pair():
            scores = {"score_chosen": item.scores[0], "score_rejected": item.scores[1]}
            known = {name: score for name, score in scores.items() if score is not None}
            return _messages(item.turns) | {"chosen": item.chosen, "rejected": item.reject} | known
        case Rated():
            return _messages(item.turns) | {"completion": item.completion, "label": item.good}
    return _messages(item.turns)


def _messages(turns: Sequence[Turn]) -> dict[str, Any]:
    spoken = [_message(turn) for turn in turns if turn.role != TOOLS]
    tools = [tool for turn in turns if turn.role == TOOLS for tool in json.loads(turn.text)]
    return {"messages": spoken} | ({"tools": tools} if tools else {})


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    thought = _THOUGHT.fullmatch(turn.text) if turn.role == "assistant" else None
    if thought is not None and "<think>" not in thought[1] + thought[2] and thought[1].strip():
        message["content"], message["thinking"] = thought[2], thought[1]
    if not turn.trained:
        message["weight"] = 0
    return message
