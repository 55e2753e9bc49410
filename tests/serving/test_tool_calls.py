"""Calls of tools in answers, as OpenAI's clients read them."""

import json

import pytest

from rwkv_rlhf.serving.tool_calls import Held, parts_of

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        ("sunny", "sunny", []),
        (f"wait\n{CALL}", "wait", ["weather"]),
        (f"{CALL}\n{CALL}", "", ["weather", "weather"]),
        ('<tool_call>{"name": "now"}', "", ["now"]),
        ("<tool_call>\n{weather}\n</tool_call>", "<tool_call>\n{weather}\n</tool_call>", []),
        ("a < b and <tool_c", "a < b and <tool_c", []),
    ],
)
def test_an_answer_with_calls(text, said, names):
    """If this breaks, a client does not see that a tool is called, or loses what is said beside it."""
    found = parts_of(text)
    assert (found.text, [one["function"]["name"] for one in found.calls]) == (said, names)
    assert all(isinstance(json.loads(one["function"]["arguments"]), dict) for one in found.calls)
    held = Held()
    streamed = "".join(held.add(letter) for letter in text)
    rest = held.end()
    assert "<tool_call>" not in streamed and [one["function"]["name"] for one in rest.calls] == names
    assert (streamed + rest.text).strip() == said
