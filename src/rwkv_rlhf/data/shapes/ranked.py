"""Several answers to one prompt with scores: the best one against each of the others."""

from __future__ import annotations

from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import normalise
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.preference import score
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Pair, Record
from rwkv_rlhf.settings.counted import counted

TEXT = ("response", "text", "content", "answer", "completion", "output")
SCORE = ("score", "overall_score", "rating")
RANK = "rank"  # 1 is the best
SCORES = ("scores", "ratings")
RANKS = "ranks"


class Answer(NamedTuple):
    """A text and how good it is; higher is better."""

    text: str
    score: float


def looks(values: dict[str, Any]) -> bool:
    """Whether the answers are a list with scores in it or beside it."""
    answers = next((values[key] for key in ("responses", "completions", "answers") if key in values), None)
    if not isinstance(answers, list) or not answers:
        return False
    beside = any(isinstance(values.get(key), list) for key in (*SCORES, RANKS))
    return beside or all(isinstance(a, dict) and any(k in a for k in (*SCORE, RANK)) for a in answers)


def read(record: Record) -> list[Pair]:
    """One pair for each answer that is worse than the best; none where all are as good."""
    question, names = record.facts.needs
    answers = sorted(_answers(record, record.get(*names)), key=lambda answer: -answer.score)
    turns = record.asked(question_turns(record, question))
    best = answers[0]
    worse = [answer for answer in answers if answer.score < best.score and answer.text != best.text]
    if not worse:
        raise RowError("no answer is better than another one", "no answer is better")
    return [
        Pair(turns, best.text, answer.text, (best.score, answer.score), best.score - answer.score) for answer in worse
    ]


def _answers(record: Record, values: object) -> list[Answer]:
    if not isinstance(values, list) or len(values) < 2:
        raise RowError("two answers with scores are needed at least", "fewer than two answers")
    scores, ranks = record.get(*SCORES), record.get(RANKS)
    beside = scores if scores is not None else [-rank for rank in ranks] if ranks is not None else None
    if beside is not None and (not isinstance(beside, list) or len(beside) != len(values)):
        raise RowError(f"{counted(len(values), 'answer')}, but not as many scores", "unreadable")
    found = []
    for number, value in enumerate(values):
        inner = value if isinstance(value, dict) else {}
        text = next((inner[key] for key in TEXT if isinstance(inner.get(key), str)), value)
        rank = score(inner.get(RANK))
        own = next((inner[key] for key in SCORE if key in inner), None if rank is None else -rank)
        worth = score(beside[number] if beside is not None else own)
        if not isinstance(text, str) or not normalise(text):
            raise RowError(f"answer {number + 1} has no text", "empty answer")
        if worth is None:
            raise RowError(f"answer {number + 1} has no score", "no score")
        found.append(Answer(normalise(text), worth))
    return found
