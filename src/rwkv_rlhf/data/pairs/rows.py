"""Preference pairs as text: a conversation and two answers, from CSV, JSONL or parquet rows."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import Row, read_csv, read_jsonl, read_parquet
from rwkv_rlhf.data.templates.builtin import ROLES, Turn, normalise

_PROMPT = ("prompt", "question")
_REJECT = ("reject", "rejected")
_SCORES = ("score_chosen", "chosen_score"), ("score_rejected", "rejected_score", "score_reject")


@dataclass(frozen=True)
class RawPair:
    """Normalised text: the turns before the answer, both answers (reject is empty where there is none), and where."""

    turns: tuple[Turn, ...]
    chosen: str
    reject: str
    where: str


def _rows(path: str | os.PathLike, report: DataReport, need_reject: bool) -> Iterator[Row]:
    reader = PAIR_ROWS.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: not a file of preference pairs; one of {', '.join(PAIR_ROWS)} (or .save)")
    return reader(path, report, need_reject)


def _csv(path: str | os.PathLike, report: DataReport, need_reject: bool) -> Iterator[Row]:
    return read_csv(path, report, (_PROMPT, ("chosen",), _REJECT) if need_reject else (_PROMPT, ("chosen",)))


# suffix -> rows
PAIR_ROWS: dict[str, Callable[[str | os.PathLike, DataReport, bool], Iterator[Row]]] = {
    ".csv": _csv,
    ".jsonl": lambda path, report, need_reject: read_jsonl(path, report),
    ".parquet": lambda path, report, need_reject: read_parquet(path, report),
}


def messages_to_turns(messages: list, name: str) -> list[Turn]:
    """Turns of a list of {role, content}; a RowError names the list and the message that is wrong."""
    turns = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RowError(f"{name}: message {number} has the role {role!r}; one of {', '.join(ROLES)}", "unreadable")
        text = message.get("content")
        if not isinstance(text, str):
            raise RowError(f"{name}: message {number} has no text under content", "unreadable")
        text = normalise(text)
        if text:
            turns.append((role, text))
        elif role != "system":
            raise RowError(f"{name}: message {number} is empty", f"empty {role} message")
    return turns


def answer_of(value: object, name: str, need: bool) -> tuple[list[Turn], str]:
    """(turns before the answer, the answer) of a text or of a list of messages whose last is the assistant's."""
    if isinstance(value, list):
        turns = messages_to_turns(value, name)
        if not turns or turns[-1][0] != "assistant":
            raise RowError(f"{name}: the last message must be the assistant's", "unreadable")
        return turns[:-1], turns[-1][1]
    if value is None and need:
        raise RowError(f"{name} is missing", f"missing {name}")
    if not isinstance(value, str | None):
        raise RowError(f"{name} must be text or a list of messages, not {type(value).__name__}", "unreadable")
    text = normalise(value or "")
    if need and not text:
        raise RowError(f"the answer {name} is empty", f"empty {name}")
    return [], text


def _first(record: dict, names: tuple[str, ...]) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)


def prompt_of(record: dict) -> list[Turn]:
    """The turns under prompt or question; RowError when they are neither text nor messages."""
    value = _first(record, _PROMPT)
    if isinstance(value, list):
        turns = messages_to_turns(value, "prompt")
    elif isinstance(value, str | None):
        text = normalise(value or "")
        turns = [("user", text)] if text else []
    else:
        raise RowError(f"prompt must be text or a list of messages, not {type(value).__name__}", "unreadable")
    return turns


def to_pair(record: dict, where: str, need_reject: bool = True) -> RawPair:
    """One row as a pair; RowError when a part is missing or empty, or the two answers are the same."""
    before, chosen = answer_of(record.get("chosen"), "chosen", True)
    other, reject = answer_of(_first(record, _REJECT), "reject", need_reject)
    if before and other and before != other:
        raise RowError("chosen and reject answer different conversations", "different conversations")
    turns = before or other or prompt_of(record)  # message lists hold the whole conversation, prompt only a copy of it
    turns = with_system(record, turns)
    check_text([*turns, ("assistant", chosen), ("assistant", reject)])
    if chosen == reject:
        raise RowError("chosen and reject are identical", "identical answers")
    return RawPair(tuple(turns), chosen, reject, where)


def with_system(record: dict, turns: list[Turn]) -> list[Turn]:
    """The turns with the optional column `system` in front; RowError when no user speaks in them."""
    if not any(role == "user" for role, _ in turns):
        raise RowError("the prompt is empty", "empty prompt")
    system = record.get("system")
    if isinstance(system, str) and normalise(system) and turns[0][0] != "system":
        turns = [("system", normalise(system)), *turns]
    return turns


def check_text(turns: Sequence[Turn]) -> None:
    """RowError for a NUL byte: it is text for no model, and usually a file of another encoding."""
    for role, text in turns:
        if "\0" in text:
            raise RowError(f"a text of the {role} holds a NUL byte: is the file UTF-16, or binary?", "NUL byte")


def _score(record: dict, names: tuple[str, ...]) -> float | None:
    """A finite number, or None: a gap in a table may be read as NaN, which is no tie."""
    try:
        value = float(_first(record, names))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _tie(record: dict, report: DataReport, drop: bool) -> bool:
    """Whether to leave out a row whose answers were scored the same; odd scores are remarked."""
    chosen, reject = (_score(record, names) for names in _SCORES)
    if chosen is None or reject is None or chosen > reject:
        return False
    if chosen < reject:
        report.remarked["score the rejected answer higher than the chosen one"] += 1
    elif drop:
        report.skip("tie: both answers have the same score")
        return True
    else:
        report.remarked["have the same score for both answers (--drop_ties 1 leaves them out)"] += 1
    return False


def read_pairs(
    path: str | os.PathLike, report: DataReport, need_reject: bool = True, drop_ties: bool = False
) -> Iterator[RawPair]:
    """Pairs of a CSV, JSONL or parquet file, normalised and checked.

    Args:
        report: counts rows and skips; its `skip_bad` decides between an error and a counted skip.
        need_reject: False lets the column or a cell of `reject` be absent (then it is an empty string).
        drop_ties: rows whose answers have the same score (score_chosen, score_rejected) are left out and counted.

    Raises:
        ValueError: with file, line and what is wrong.
    """
    seen: set[int] = set()
    for where, record in _rows(path, report, need_reject):
        try:
            pair = to_pair(record, where, need_reject)
        except RowError as error:
            report.bad(where, error)
            continue
        if _tie(record, report, drop_ties):
            continue
        key, swapped = hash((pair.turns, pair.chosen, pair.reject)), hash((pair.turns, pair.reject, pair.chosen))
        report.remarked["repeat another one"] += key in seen
        report.remarked["say the opposite of another one"] += swapped in seen
        seen.add(key)
        yield pair


def is_pair_record(record: dict) -> bool:
    """Whether a row (keys in lower case) is a preference pair rather than text."""
    return "chosen" in record and any(name in record for name in _REJECT)
