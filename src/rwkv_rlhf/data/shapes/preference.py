"""Preference pairs: what was asked, a chosen and a rejected answer; the answers may be whole conversations."""

from __future__ import annotations

import math

from rwkv_rlhf.data.conversation import Turn, is_missing, normalise, refuse_nul
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.answer import parse_answer
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Pair, Record
from rwkv_rlhf.settings.shapes import CHOSEN, MARGIN, PROMPT, REJECT, SCORES, Names

# where the prompt may stand beside two answers, in this order
ASKED: tuple[Names, ...] = (PROMPT, ("instruction",), ("conversations", "conversation"), ("messages",))


def read(record: Record) -> list[Pair]:
    """One pair; RowError when a part is missing or empty, or the two answers are the same."""
    chosen = parse_answer(record, CHOSEN)
    reject = parse_answer(record, REJECT, need=not record.spare)
    if chosen.before and reject.before and chosen.before != reject.before:
        raise RowError("chosen and reject answer different conversations", "different conversations")
    turns = _with_prompt(record, chosen.before or reject.before)
    return [make_pair(record, turns, chosen.text, reject.text)]


def _asked(record: Record) -> list[Turn] | None:
    """The turns of the prompt, none where it is empty; None where no key is for one."""
    there = [names for names in ASKED if any(name in record.values for name in names)]
    if not there:
        return None
    filled = (names for names in there if not all(is_missing(record.values.get(name)) for name in names))
    return question_turns(record, next(filled, there[0]))


def _with_prompt(record: Record, before: list[Turn]) -> list[Turn]:
    """The prompt's turns: those of the answers' own conversation, of which the key prompt often has a copy."""
    asked = _asked(record)
    if not before:
        if asked is None:
            legal = "prompt, question, instruction, conversations or messages"
            raise RowError(f"chosen and rejected answer nothing: a prompt is needed, under {legal}", "no prompt")
        return asked
    if not asked:
        return before
    if len(asked) >= len(before) and asked[len(asked) - len(before) :] == before:
        return asked  # the answers repeat its end only
    spoken = "\n".join(turn.text for turn in before)
    copy = all(turn in before or (len(asked) == 1 and normalise(turn.text) in spoken) for turn in asked)
    if not copy:
        record.notes.remarks["have a prompt that is not in the messages of chosen: the messages are trained"] += 1
    return before


def make_pair(record: Record, turns: list[Turn], chosen: str, reject: str) -> Pair:
    """The pair, complete and checked; RowError for answers that are the same."""
    if turns and turns[-1] == Turn("assistant", chosen):
        turns = turns[:-1]  # a whole chat beside its two answers
    asked = record.asked(turns)
    refuse_nul([Turn("assistant", chosen), Turn("assistant", reject)])
    if chosen == reject:
        raise RowError("chosen and reject are identical", "identical answers")
    scores = score(record.get(*SCORES[0])), score(record.get(*SCORES[1]))
    return Pair(asked, chosen, reject, scores, margin_of(score(record.get(MARGIN)), *scores))


def margin_of(said: float | None, chosen: float | None, reject: float | None) -> float | None:
    """By how much a row rates the chosen answer higher: what it says, or the difference of both scores."""
    if said is not None:
        return said
    return None if chosen is None or reject is None else chosen - reject


def score(value: object) -> float | None:
    """A finite number, or None: a gap in a table may be read as NaN, which is no tie."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
