"""Texts that hold a whole conversation with the speakers' names in them, and how they are split into turns."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from rwkv_rlhf.data.conversation import Turn, normalise


class Style(NamedTuple):
    """How a transcript marks who speaks: `mark` matches where a turn begins and names the speaker; `end` closes it."""

    mark: re.Pattern[str]
    roles: dict[str, str]
    end: str = ""


STYLES = (
    Style(
        re.compile(r"(?:\A|\n)[^\S\n]*(System|Human|User|Assistant|Bot|AI)[^\S\n]*:[^\S\n]*"),
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "assistant": "assistant",
            "bot": "assistant",
            "ai": "assistant",
        },
    ),
    Style(
        re.compile(
            r"(?:\A|\n)### ?(System|Instruction|Input|Human|User|Response|Assistant|Output):?[^\S\n]*(?:\n|(?=\S)|\Z)"
        ),
        {
            "system": "system",
            "instruction": "user",
            "input": "user",
            "human": "user",
            "user": "user",
            "response": "assistant",
            "assistant": "assistant",
            "output": "assistant",
        },
    ),
    Style(
        re.compile(r"(?:\A|\n?)<\|im_start\|>(system|user|assistant)\n"),
        {"system": "system", "user": "user", "assistant": "assistant"},
        "<|im_end|>",
    ),
)


def split_transcript(text: str) -> list[Turn] | None:
    """The turns of a text that is a transcript from its first word on; None for any other.

    An empty turn of the assistant at the end is the cue for an answer, and left out. A transcript begins with the user
    (or a system text), and nobody in it speaks twice in a row but the user.
    """
    text = text.strip()
    for style in STYLES:
        marks = list(style.mark.finditer(text))
        if not marks or marks[0].start() != 0:
            continue
        turns = []
        for mark, after in zip(marks, [*marks[1:], None]):
            said = text[mark.end() : after.start() if after else len(text)].strip().removesuffix(style.end)
            turns.append(Turn(style.roles[mark[1].lower()], normalise(said)))
        if turns[-1].role == "assistant" and not turns[-1].text:
            turns.pop()
        return joined(turns) if _is_conversation(turns) else None
    return None


def holds_speakers(text: str) -> bool:
    """Whether a text that is no transcript has a line that begins one's turn."""
    return any(style.mark.search(text) for style in STYLES)


def _is_conversation(turns: list[Turn]) -> bool:
    spoken = [turn.role for turn in turns if turn.role != "system"]
    first_only = all(turn.role != "system" for turn in turns[1:])
    alternate = all(a != b or a == "user" for a, b in pairwise(spoken))
    return bool(spoken) and spoken[0] == "user" and first_only and alternate and all(turn.text for turn in turns)


def joined(turns: list[Turn]) -> list[Turn]:
    """Neighbouring turns of the user as one (an instruction and its input)."""
    out: list[Turn] = []
    for turn in turns:
        if out and out[-1].role == turn.role == "user":
            out[-1] = Turn("user", normalise(f"{out[-1].text}\n\n{turn.text}"))
        else:
            out.append(turn)
    return out
