"""Lists of messages as turns: {role, content} of OpenAI's form and {from, value} of ShareGPT's, with their relatives.

Thinking, calls of tools and what the tools answer become text, in one form whatever the file:
`<think>\\n...\\n</think>\\n` before an answer, `<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>` behind
it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import TOOLS, Turn, is_missing, normalise
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.files import parse_json
from rwkv_rlhf.settings.counted import predicated

# what other programs call a role -> ours
SPEAKERS: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles whose text is a call
THINKING = ("thinking", "reasoning_content", "reasoning")
WEIGHTS = ("weight", "loss", "loss_weight", "train")
ROLE, CONTENT = ("role", "from"), ("content", "value")
CALLS = ("tool_calls", "function_call")
READ = frozenset({*ROLE, *CONTENT, *THINKING, *WEIGHTS, *CALLS})
BOTH = ({"human", "assistant"}, {"user", "assistant"})  # keys of a question with its answer in one message
# type of a part -> what it holds
PARTS: dict[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "thought",
    "thinking": "thought",
    "tool_call": "call",
}
SAID = ("text", "value", "content", "thinking")  # keys of a part's text


class Notes:
    """What was met in rows and is said of the whole file: keys that nobody read, thoughts that were dropped.

    Attributes:
        drop_thinking: --thinking drop.
        unread: key -> rows that have it. remarks: what rows had or were -> how many of them.
        example: the first prompt that holds names of speakers and is no transcript.
    """

    def __init__(self, drop_thinking: bool = False) -> None:
        self.drop_thinking = drop_thinking
        self.unread: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.example = ""

    def speakers(self, key: str, text: str) -> None:
        """Counts a text under `key` that holds lines like `User:` and is no transcript."""
        self.remarks[f"have lines like `User:` inside {key} without being transcripts"] += 1
        self.example = self.example or (text if len(text) <= 60 else f"{text[:57]}...")

    def lines(self) -> list[str]:
        """A sentence for each of them."""
        out = [predicated(count, "row", f"have `{key}`: not read") for key, count in sorted(self.unread.items())]
        out += [predicated(count, "row", what) for what, count in self.remarks.items()]
        return out + ([f"the first of those with lines of speakers: {self.example!r}"] if self.example else [])


def parse_messages(messages: object, name: str, notes: Notes | None = None) -> list[Turn]:
    """Turns of a list of messages; RowError names the list (`name`) and the message that is wrong."""
    if is_missing(messages):
        raise RowError(f"{name} is empty", f"empty {name}")
    if not isinstance(messages, list):
        raise RowError(f"{name} must be a list of {{role, content}}, not {type(messages).__name__}", "unreadable")
    notes = notes or Notes()
    turns = []
    for number, message in enumerate(_apart(messages), 1):
        where = f"{name}: message {number}"
        turn = _turn(message, where, notes)
        if turn.text or turn.role == "tool":  # a tool may have nothing to say
            turns.append(turn)
        elif turn.role != "system":
            raise RowError(f"{where} is empty", f"empty {turn.role} message")
    unread = {f"{name}[].{key}" for m in _apart(messages) for key in m.keys() - READ if not is_missing(m[key])}
    notes.unread.update(unread)
    return turns


def _apart(messages: list[Any]) -> Iterator[Any]:
    """The messages; one that is a question with its answer ({human, assistant}) as two."""
    for message in messages:
        if isinstance(message, dict) and message.keys() in BOTH:
            yield from ({"role": role, "content": text} for role, text in message.items())
        else:
            yield message


def _turn(message: object, where: str, notes: Notes) -> Turn:
    said = _first(message, ROLE) if isinstance(message, dict) else None
    role = SPEAKERS.get(said.lower()) if isinstance(said, str) else None
    if role is None or not isinstance(message, dict) or not isinstance(said, str):
        legal = ", ".join(dict.fromkeys(SPEAKERS.values()))
        raise RowError(f"{where} has the role {said!r}; one of {legal}", "unreadable")
    calls = [call for key in CALLS for call in _listed(message.get(key))]
    parts = _parts(_first(message, CONTENT), where)
    if not parts and not calls:
        raise RowError(f"{where} has no text under content", "unreadable")
    text = "\n".join(part.text for part in parts if part.kind == "text")
    calls += [call for part in parts if part.kind == "call" for call in _calls_in(part.text, where)]
    if said.lower() in CALLING:
        calls, text = [*calls, *_calls_in(text, where)], ""
    thought = _first(message, THINKING) or "\n".join(part.text for part in parts if part.kind == "thought")
    if not is_missing(thought):
        text = _with_thought(text, thought, where, notes)
    text = normalise("\n".join([text, *(call_text(call, where) for call in calls)]))
    return Turn(role, text, _trained(message, role, where, notes))


def _first(message: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)


def _listed(value: object) -> list[Any]:
    """A list as it is, one thing as a list of it, what is missing as none."""
    if is_missing(value):
        return []
    return value if isinstance(value, list) else [value]


class Part(NamedTuple):
    """A piece of a message: text, a thought or a call, and its text."""

    kind: str
    text: str


def _parts(content: object, where: str) -> list[Part]:
    """What a message holds, none where it is missing. RowError for a part that is no text."""
    if isinstance(content, str):
        return [Part("text", content)]
    if is_missing(content):
        return [Part("text", "")] if isinstance(content, float) else []
    if not isinstance(content, list):
        return []
    return [_part(part, where) for part in content]


def _part(part: object, where: str) -> Part:
    if isinstance(part, str):
        return Part("text", part)
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = _first(part, SAID) if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS or not isinstance(text, str):
        named = f"{kind!s:.60}"
        raise RowError(f"{where} holds a part of the type {named}: only text is read", f"a part that is {named}")
    return Part(PARTS[kind], text)


def _with_thought(text: str, thought: object, where: str, notes: Notes) -> str:
    if not isinstance(thought, str):
        raise RowError(f"{where} has thinking that is no text, but {type(thought).__name__}", "unreadable")
    if notes.drop_thinking:
        notes.remarks["had thinking that was dropped (--thinking drop)"] += 1
        return text
    if "<think>" in text:
        raise RowError(f"{where} has thinking twice: in a key of its own and in its text", "two thoughts")
    return f"<think>\n{normalise(thought)}\n</think>\n{text}"


def _trained(message: dict[str, Any], role: str, where: str, notes: Notes) -> bool:
    """What `weight`, `loss`, `loss_weight` and `train` say: 0 or false keeps a turn from being learnt."""
    trained = True
    for name in WEIGHTS:
        value = message.get(name)
        if is_missing(value):
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{where} has {name} {value!r}: only 0 and 1 (false and true) are legal", "unreadable")
        trained = trained and bool(value)
        if value and role != "assistant":
            notes.remarks[f"ask to train what the {role} says: not done without --train_on_prompt 1"] += 1
    return trained


def call_text(call: object, where: str) -> str:
    """One call of a tool as text. RowError for what has no name and no arguments."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(name, str):
        raise RowError(f"{where} has a call of a tool without a name", "unreadable")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # some programs call with a text that is no JSON: it stays that text
            arguments = parse_json(arguments)
    said = json.dumps({"name": name, "arguments": arguments or {}}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


def _calls_in(text: str, where: str) -> list[Any]:
    """The calls in the text of ShareGPT's `function_call`."""
    try:
        return _listed(parse_json(text))
    except ValueError as error:
        raise RowError(f"{where} must hold a call as JSON ({error})", "unreadable") from error


def tools_turn(value: object) -> list[Turn]:
    """A turn that lists the tools of the key `tools` (a list, or its JSON text); none where there are none."""
    if is_missing(value):
        return []
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError(f"tools must be a list of tools, or JSON of one ({error})", "unreadable") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of objects", "unreadable")
    return [Turn(TOOLS, json.dumps(value, ensure_ascii=False))] if value else []
