"""Calls of tools in the text of an answer, in the form in which training data has them (data/messages.py)."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, NamedTuple

from rwkv_rlhf.files import parse_json

OPEN = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)


class Parts(NamedTuple):
    """The text of an answer without its calls, and those as OpenAI's API has them."""

    text: str
    calls: list[dict[str, Any]]


def parts_of(text: str) -> Parts:
    """What an answer says and calls; a call that is no JSON with a name stays text."""
    calls: list[dict[str, Any]] = []

    def taken(found: re.Match[str]) -> str:
        try:
            call = parse_json(found[1])
        except ValueError:
            return found[0]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return found[0]
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return ""

    said = CALL.sub(taken, text)
    return Parts(said.strip() if calls else said, calls)


class Held:
    """Streams a text up to where a call begins, or may begin; the rest is known when the answer is whole."""

    def __init__(self) -> None:
        self.text = ""
        self._given = 0

    def add(self, text: str) -> str:
        """More of the text; what of it may be said now."""
        self.text += text
        end = self.text.find(OPEN)
        if end < 0:
            begun = next((size for size in range(len(OPEN) - 1, 0, -1) if self.text.endswith(OPEN[:size])), 0)
            end = len(self.text) - begun
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def end(self) -> Parts:
        """The calls, and the text that was held back and is none."""
        return parts_of(self.text[self._given :])
