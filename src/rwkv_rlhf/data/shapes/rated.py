"""Answers that are good or bad on their own: prompt, completion and label; or a chat whose last answer is rated."""

from __future__ import annotations

from rwkv_rlhf.data.conversation import Turn, is_missing, refuse_nul
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.answer import parse_answer
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Rated, Record
from rwkv_rlhf.settings.shapes import LABEL, PROMPT

LABELS = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
COMPLETION = ("completion",)


def read(record: Record) -> list[Rated]:
    """One answer; the prompt is text or messages."""
    names = PROMPT if any(name in record.values for name in PROMPT) else ("messages",)
    answer = parse_answer(record, COMPLETION)
    return [_rated(record, [*question_turns(record, names), *answer.before], answer.text)]


def read_chat(record: Record) -> list[Rated]:
    """The chat's last turn is the answer."""
    turns = record.turns(record.facts.needs[0])
    if not turns or turns[-1].role != "assistant":
        raise RowError("the last message must be the assistant's: it is what the label rates", "no answer")
    return [_rated(record, turns[:-1], turns[-1].text)]


def _rated(record: Record, turns: list[Turn], answer: str) -> Rated:
    asked = record.asked(turns)
    refuse_nul([Turn("assistant", answer)])
    return Rated(asked, answer, _label(record.get(*LABEL)))


def _label(value: object) -> bool:
    """True for good. RowError for anything but true, false, 1, 0, good and bad."""
    if isinstance(value, float) and value in (0.0, 1.0):  # parquet's idea of a column with gaps
        value = int(value)
    text = str(value).strip().lower()
    found = LABELS.get(text.removesuffix(".0"))
    if is_missing(value) or found is None:
        said = "missing" if is_missing(value) else repr(value)
        sentence = f"label is {said}; it must be true, 1 or good, or false, 0 or bad"
        raise RowError(sentence, "missing label" if is_missing(value) else "unreadable label")
    return found
