"""Chat templates that come with a tokenizer: Jinja text, rendered in a sandbox because a user may download any file.

A .jinja file is the template itself. A tokenizer_config.json holds it under `chat_template` (a text, or a list of
{name, template}, of which `default` is taken) beside the texts of the special tokens, which templates refer to.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from src.data.report import RowError
from src.data.templates import Form, Turn
from src.files import read_bytes

PROBE = "4n5wer"  # an answer whose place in the rendered text shows what the template writes around it
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks of what is trained; here the answer is
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _refuse(message: object) -> str:
    raise RowError(f"the chat template refuses this conversation: {message}", "refused by the template")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template, compiled with what Hugging Face's templates expect to find."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise ValueError("a Jinja --template needs the package jinja2: pip install jinja2") from error
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(_GENERATION.sub("", source))


@dataclass(frozen=True)
class JinjaForm(Form):
    """A form whose text a chat template writes.

    Attributes:
        source: the template. special: (name, text) of the special tokens.
        end: the mark that closes an answer, which sampling stops at.
        end_ids: the end of document, 0, where the template writes no such mark.
    """

    assistant: str = "assistant"
    whole: bool = True
    source: str = ""
    special: tuple[tuple[str, str], ...] = ()

    def _render(self, turns: Sequence[Turn], cue: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            nothing = {"tools": None, "documents": None}  # what templates ask for with `is none`
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=cue, **nothing, **dict(self.special)
            )
        except (RowError, MemoryError):
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            sentence = f"the chat template cannot write this conversation: {error}"
            raise RowError(sentence, "refused by the template") from error

    def prompt(self, turns: Sequence[Turn], answers: Sequence[str] = ()) -> str:
        """The conversation so far and the template's cue for an answer."""
        return self._render(turns, True)

    def history(self, turns: Sequence[Turn]) -> str:
        """Finished turns."""
        return self._render(turns, False)

    def written(self, turns: Sequence[Turn], answers: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt, and each answer with its closing mark as the template writes them behind it."""
        prompt = self.prompt(turns)
        whole = [self.history([*turns, ("assistant", answer)]) for answer in answers]
        for text in whole:
            if not text.startswith(prompt):
                sentence = "the chat template writes a conversation with its answer otherwise than the prompt of it"
                raise RowError(sentence, "refused by the template")
        return prompt, [text[len(prompt) :] for text in whole]

    def pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
        """As `Form.pieces`; RowError for a template that writes an earlier turn otherwise once more turns follow."""
        said = ""
        for at, (role, text) in enumerate(turns):
            if role != "assistant":
                continue
            prompt, (answer,) = self.written(turns[:at], [text])
            if not prompt.startswith(said):
                raise RowError("the chat template rewrites earlier turns of this chat", "refused by the template")
            yield prompt[len(said) :], False
            yield answer, True
            said = prompt + answer
        whole = self.history(turns)
        if turns and turns[-1][0] != "assistant" and whole.startswith(said):
            yield whole[len(said) :], False


def _from_config(path: Path, text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(template, special tokens) of a tokenizer_config.json."""
    try:
        config = json.loads(text)
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


@functools.lru_cache(maxsize=4)
def load_chat_template(path: str | os.PathLike) -> JinjaForm:
    """The form that a .jinja file or a tokenizer_config.json describes.

    Raises ValueError, naming --template and the file, for a missing or malformed file and for a template that cannot
    write a question with its answer.
    """
    path = Path(path)
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    source, special = _from_config(path, text) if path.suffix.lower() == ".json" else (text, ())
    special = special or tuple((name, "") for name in _SPECIAL)
    try:
        form = JinjaForm(source=source, special=special)
        answer = form.written([("user", "Hi")], [PROBE])[1][0]
    except ValueError as error:
        raise ValueError(f"--template {path}: {error}") from error
    if PROBE not in answer:
        raise ValueError(f"--template {path} does not write the assistant's text")
    end = answer.split(PROBE)[1].strip()
    return JinjaForm(source=source, special=special, end=end, end_ids=() if end else (0,))
