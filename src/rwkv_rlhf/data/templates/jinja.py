"""Chat templates that come with a tokenizer: Jinja text, run in a sandbox and in a process of its own
(`jinja_process.py`), because a user may download any file.

A .jinja file is the template itself. A tokenizer_config.json holds it under `chat_template` (a text, or a list of
{name, template}, of which `default` is taken) beside the texts of the special tokens, which templates refer to.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rwkv_rlhf.data.conversation import TOOLS, Turn
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.templates.template import Rendered, Span, Template, with_tools_said
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import parse_json, read_bytes

PROBE = "4n5wer"  # an answer whose place in the rendered text shows what the template writes around it
SECONDS = 20  # that a template may take for one conversation, on a busy machine; it needs less than a thousandth
_CALL = re.compile(r"<tool_call>\n(\{.*\})\n</tool_call>")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TemplateProcess:
    """The process that runs templates, started when it is first asked, and one for each process that asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = -1

    def ask(self, source: str, values: dict[str, Any]) -> dict[str, str]:
        """What `jinja_process.py` answers. Raises ValueError when it does not answer in SECONDS, or dies."""
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                self._child, self._owner = _start(), os.getpid()
            try:
                return _exchange(self._child, {"source": source, "values": values})
            except (OSError, EOFError, TimeoutError) as error:
                self._child.kill()
                self._child = None
                slow = isinstance(error, TimeoutError)
                how = f"takes more than {SECONDS} seconds" if slow else "ended the process that runs it"
                raise ValueError(f"the chat template {how}: it cannot be used") from error


def _start() -> "subprocess.Popen[bytes]":
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("a Jinja --template needs the package jinja2: pip install jinja2")
    program = Path(__file__).with_name("jinja_process.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _exchange(child: "subprocess.Popen[bytes]", request: dict[str, Any]) -> dict[str, str]:
    """Raises TimeoutError, EOFError, or OSError when the process is gone."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    end, parts = time.monotonic() + SECONDS, [b""]
    while not parts[-1].endswith(b"\n"):
        if not select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        parts.append(os.read(child.stdout.fileno(), 1 << 20))
        if not parts[-1]:
            raise EOFError
    answer: dict[str, str] = json.loads(b"".join(parts))
    return answer


@functools.cache
def template_process() -> TemplateProcess:
    """The one of this program."""
    return TemplateProcess()


@dataclass(frozen=True)
class JinjaTemplate(Template):
    """A template whose text Jinja writes.

    Attributes:
        source: the template. special: (name, text) of the special tokens. now: the time that the template may ask
            for, the same for the whole run. final: what it writes behind the last turn only.
        end: the mark that closes an answer, which sampling stops at.
        end_ids: the end of document, 0, where the template writes no such mark.
    """

    assistant: str = "assistant"
    whole_conversation: bool = True
    source: str = ""
    special: tuple[tuple[str, str], ...] = ()
    now: str = ""
    final: str = ""

    def as_jinja(self) -> str:
        """The template itself, with its own texts of the special tokens that it names."""
        named = [(name, text) for name, text in self.special if name in self.source]
        return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in named) + self.source

    def _render(self, turns: Sequence[Turn], cue: bool) -> str:
        tools = json.loads(turns[0].text) if turns and turns[0].role == TOOLS else None
        if tools and "tools" not in self.source:
            tools, turns = None, with_tools_said(turns)
        messages = messages_of(turns, calls="tool_calls" in self.source)
        values = {"messages": messages, "add_generation_prompt": cue, "tools": tools, "documents": None}
        values |= {"now": self.now, **dict(self.special)}
        answer = template_process().ask(self.source, values)
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            sentence = f"the chat template refuses this conversation: {answer['refused']}"
        else:
            sentence = f"the chat template cannot write this conversation: {answer['failed']}"
        raise RowError(sentence, "refused by the template")

    def ids(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """As `Template.ids`; a special token that the vocabulary has under its name becomes its id."""
        found: list[int] = []
        for piece in _split_marks(text, tokenizer.marks):
            found += [tokenizer.marks[piece]] if piece in tokenizer.marks else tokenizer.encode(piece)
        return found

    def marks(self, tokenizer: Tokenizer) -> list[str]:
        """As `Template.marks`: those that stand in a question with its answer."""
        said = self.history([Turn("user", "Hi"), Turn("assistant", PROBE)])
        named = [text for _, text in self.special if text and not text.isspace() and text in said]
        return [text for text in dict.fromkeys(named) if len(self.ids(text, tokenizer)) > 1]

    def prompt(self, turns: Sequence[Turn], answers: Sequence[str] = ()) -> str:
        """The conversation so far and the template's cue for an answer."""
        return self._render(turns, True)

    def history(self, turns: Sequence[Turn]) -> str:
        """Finished turns."""
        return self._render(turns, False)

    def render(self, turns: Sequence[Turn], answers: Sequence[str]) -> Rendered:
        """The prompt, and each answer with its closing mark as the template writes them behind it."""
        prompt = self.prompt(turns)
        whole = [self.history([*turns, Turn("assistant", answer)]) for answer in answers]
        for text in whole:
            if not text.startswith(prompt):
                sentence = "the chat template writes a prompt differently once an answer follows it"
                raise RowError(sentence, "refused by the template")
        return Rendered(prompt, [text[len(prompt) :] for text in whole])

    def spans(self, turns: Sequence[Turn]) -> Iterator[Span]:
        """As `Template.spans`; RowError for a template that rewrites earlier turns once more turns follow."""
        said = ""
        for at, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt, (answer,) = self.render(turns[:at], [turn.text])
            if not prompt.startswith(said):
                raise RowError("the chat template rewrites earlier turns of this chat", "refused by the template")
            if at < len(turns) - 1:
                answer = answer.removesuffix(self.final)
            yield Span(prompt[len(said) :], False)
            yield Span(answer, True, turn.trained)
            said = prompt + answer
        whole = self.history(turns)
        if turns and turns[-1].role != "assistant" and whole.startswith(said):
            yield Span(whole[len(said) :], False)


def _from_config(path: Path, text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(template, special tokens) of a tokenizer_config.json."""
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ValueError(f"--template {path}: not JSON ({error})") from error
    source = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default", next(iter(named.values()), None))
    if not isinstance(source, str):
        raise ValueError(f"--template {path} holds no chat_template; give a .jinja file or a tokenizer_config.json")
    special = []
    for name in _SPECIAL:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        special.append((name, value if isinstance(value, str) else ""))
    return source, tuple(special)


RUN_TIME: ContextVar[str] = ContextVar("run_time", default="")  # in ISO 8601; "" = when a template is loaded


@contextmanager
def written_at(moment: str) -> Iterator[None]:
    """Inside the block `moment` (in ISO 8601) is the present that templates write, as of a run that is resumed."""
    token = RUN_TIME.set(moment)
    try:
        yield
    finally:
        RUN_TIME.reset(token)


@functools.lru_cache(maxsize=4)
def load_chat_template(path: str | os.PathLike[str], now: str = "") -> JinjaTemplate:
    """The template that a .jinja file or a tokenizer_config.json describes; `now` is its present, "" = this moment.

    Raises ValueError, naming --template and the file, for a missing or malformed file and for a template that cannot
    write a question with its answer.
    """
    path = Path(path)
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    source, special = _from_config(path, text) if path.suffix.lower() == ".json" else (text, ())
    special = special or tuple((name, "") for name in _SPECIAL)
    try:
        template = JinjaTemplate(source=source, special=special, now=now or datetime.now().isoformat())
        final = _final_mark(template)
        answer = template.render([Turn("user", "Hi")], [PROBE]).answers[0]
    except ValueError as error:
        raise ValueError(f"--template {path}: {error}") from error
    if PROBE not in answer:
        raise ValueError(f"--template {path} does not write the assistant's text")
    end = answer.removesuffix(final).split(PROBE)[1].strip()
    return dataclasses.replace(template, final=final, end=end, end_ids=() if end else (0,))


def _final_mark(template: JinjaTemplate) -> str:
    """What the template writes behind a finished conversation and takes back when it goes on."""
    said = [Turn("user", "Hi"), Turn("assistant", PROBE)]
    whole = template.history(said)
    try:
        longer = template.prompt([*said, Turn("user", "Hi")])
    except RowError:  # a template for one question only
        return ""
    if longer.startswith(whole):
        return ""
    marks = [re.escape(text) for _, text in template.special if text]
    begins = [match.start() for match in re.finditer("|".join([*marks, "<"]), whole)]
    cut = next((at for at in reversed(begins) if longer.startswith(whole[:at])), 0)
    return whole[cut:] if PROBE in whole[:cut] else ""


def _split_marks(text: str, marks: Iterable[str]) -> list[str]:
    """The text cut at these marks, which are pieces of their own."""
    pattern = "|".join(map(re.escape, marks))
    return [piece for piece in re.split(f"({pattern})", text) if piece] if pattern else [text]


def messages_of(turns: Sequence[Turn], calls: bool) -> list[dict[str, Any]]:
    """The turns as templates expect them: with `calls`, calls of tools apart from the text."""
    messages: list[dict[str, Any]] = []
    asked: list[str] = []  # ids of calls that no tool has answered yet
    number = 0
    for role, text, _ in turns:
        message: dict[str, Any] = {"role": role, "content": text}
        if role == "tool" and asked:
            message["tool_call_id"] = asked.pop(0)
        if role == "assistant" and calls and (found := _CALL.findall(text)):
            message |= {"content": _CALL.sub("", text).strip(), "tool_calls": []}
            for call in found:
                number += 1
                asked.append(f"call{number:05d}")  # nine characters: Mistral's templates want as many
                said = {"id": asked[-1], "type": "function", "function": json.loads(call)}
                message["tool_calls"].append(said)
        if role != TOOLS:
            messages.append(message)
    return messages
