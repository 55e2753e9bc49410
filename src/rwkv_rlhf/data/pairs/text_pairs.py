"""Preference pairs as text: a conversation and two answers, from CSV, JSONL or parquet rows."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import Turn, normalise, parse_messages, refuse_nul, with_system
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import has_rows, read_rows
from rwkv_rlhf.settings.formats import names_of_formats

PROMPT = ("prompt", "question")  # names of columns that mean the same
CHOSEN = ("chosen",)
REJECT = ("reject", "rejected")
_SCORES = ("score_chosen", "chosen_score"), ("score_rejected", "rejected_score", "score_reject")


@dataclass(frozen=True)
class TextPair:
    """Normalised text: the turns before the answer, both answers (reject is empty where there is none), and where."""

    turns: tuple[Turn, ...]
    chosen: str
    reject: str
    where: str


class ParsedAnswer(NamedTuple):
    """An answer as text, and the turns before it where a list of messages holds them."""

    before: list[Turn]
    text: str


def parse_answer(value: object, name: str, need: bool) -> ParsedAnswer:
    """The answer in a cell `name`: a text, or a list of messages whose last is the assistant's.

    Raises RowError for anything else, and for an answer that is missing or empty if there must be one (`need`).
    """
    if isinstance(value, list):
        turns = parse_messages(value, name)
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{name}: the last message must be the assistant's", "unreadable")
        return ParsedAnswer(turns[:-1], turns[-1].text)
    if value is None and need:
        raise RowError(f"{name} is missing", f"missing {name}")
    if not isinstance(value, str | None):
        raise RowError(f"{name} must be text or a list of messages, not {type(value).__name__}", "unreadable")
    text = normalise(value or "")
    if need and not text:
        more = "; rlhf_generate_reject_csv.py samples rejects" if name == "reject" else ""
        raise RowError(f"the answer {name} is empty{more}", f"empty {name}")
    return ParsedAnswer([], text)


def _first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def parse_prompt(record: dict[str, Any]) -> list[Turn]:
    """The turns under prompt or question; RowError when they are neither text nor messages."""
    value = _first(record, PROMPT)
    if isinstance(value, list):
        return parse_messages(value, "prompt")
    if not isinstance(value, str | None):
        raise RowError(f"prompt must be text or a list of messages, not {type(value).__name__}", "unreadable")
    text = normalise(value or "")
    return [Turn("user", text)] if text else []


def complete_prompt(turns: list[Turn], record: dict[str, Any]) -> list[Turn]:
    """The turns behind the record's system text, if it has one; RowError when no user speaks in them."""
    if not any(turn.role == "user" for turn in turns):
        raise RowError("the prompt is empty", "empty prompt")
    return with_system(turns, record.get("system"))


def parse_pair(record: dict[str, Any], where: str, need_reject: bool = True) -> TextPair:
    """One row as a pair; RowError when a part is missing or empty, or the two answers are the same."""
    chosen = parse_answer(record.get("chosen"), "chosen", True)
    reject = parse_answer(_first(record, REJECT), "reject", need_reject)
    if chosen.before and reject.before and chosen.before != reject.before:
        raise RowError("chosen and reject answer different conversations", "different conversations")
    # lists of messages hold the whole conversation, prompt only a copy of it
    turns = complete_prompt(chosen.before or reject.before or parse_prompt(record), record)
    refuse_nul([*turns, Turn("assistant", chosen.text), Turn("assistant", reject.text)])
    if chosen.text == reject.text:
        raise RowError("chosen and reject are identical", "identical answers")
    return TextPair(tuple(turns), chosen.text, reject.text, where)


def _score(record: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """A finite number, or None: a gap in a table may be read as NaN, which is no tie."""
    try:
        value = float(_first(record, names))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _tie(record: dict[str, Any], report: DataReport, drop: bool) -> bool:
    """Whether to leave out a row whose answers were scored the same; odd scores are remarked."""
    chosen, reject = (_score(record, names) for names in _SCORES)
    if chosen is None or reject is None or chosen > reject:
        return False
    if chosen < reject:
        report.remark("score the rejected answer higher than the chosen one")
    elif drop:
        report.skip("tie: both answers have the same score")
        return True
    else:
        report.remark("have the same score for both answers (--drop_ties 1 leaves them out)")
    return False


def read_pairs(
    path: str | os.PathLike[str], report: DataReport, need_reject: bool = True, drop_ties: bool = False
) -> Iterator[TextPair]:
    """Pairs of a CSV, JSONL or parquet file, normalised and checked.

    Args:
        report: counts rows and skips; its `skip_bad` decides between an error and a counted skip.
        need_reject: False lets the column or a cell of `reject` be absent (then it is an empty string).
        drop_ties: rows whose answers have the same score (score_chosen, score_rejected) are left out and counted.

    Raises:
        ValueError: with file, line and what is wrong.
    """
    seen: set[int] = set()
    if not has_rows(path):
        legal = ", ".join(names_of_formats("rated"))  # those with rows
        raise ValueError(f"{path}: not a file of preference pairs; one of {legal} (or .save)")
    columns = (PROMPT, CHOSEN, REJECT) if need_reject else (PROMPT, CHOSEN)
    for where, record in read_rows(path, report, columns):
        try:
            pair = parse_pair(record, where, need_reject)
        except RowError as error:
            report.bad(where, error)
            continue
        if _tie(record, report, drop_ties):
            continue
        key, swapped = hash((pair.turns, pair.chosen, pair.reject)), hash((pair.turns, pair.reject, pair.chosen))
        report.remark("repeat another one", key in seen)
        report.remark("say the opposite of another one", swapped in seen)
        seen.add(key)
        yield pair


def is_pair_record(record: dict[str, Any]) -> bool:
    """Whether a row (keys in lower case) is a preference pair rather than text."""
    return "chosen" in record and any(name in record for name in REJECT)
