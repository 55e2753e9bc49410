"""How a field of Config is declared: its default, help and legal range, and what it is to a run that is resumed."""

import dataclasses
import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

Choices = tuple[str | int, ...]


class OnResume(Enum):
    """What a setting is to a run that goes on from a resume point (training/run_identity.py)."""

    SAME = "the same value"  # decides how training goes on
    FILE = "a file of the same content, here or elsewhere"
    ROUNDS = "any value; the rest is as good, not the same bits"  # the same mathematics in another order
    ROUNDS_IF_EXACT = "with {bptt} exact any value (the rest is as good, not the same bits), otherwise the same one"
    MAY_CHANGE = (
        "any value"  # never reaches the weights, or is checked otherwise: sizes by the base, ranks by the point
    )


FILE, ROUNDS, ROUNDS_IF_EXACT = OnResume.FILE, OnResume.ROUNDS, OnResume.ROUNDS_IF_EXACT
MAY_CHANGE = OnResume.MAY_CHANGE

LIMITS = (
    ("at_least", ">=", operator.ge),
    ("above", ">", operator.gt),
    ("at_most", "<=", operator.le),
    ("below", "<", operator.lt),
)


def setting(
    default: Any,
    help: str,
    *,
    choices: Choices | Callable[[], Choices] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    resume: OnResume = OnResume.SAME,
) -> Any:
    """A dataclass field with its help text and the values it may take; choices out of a table are looked up late.

    `resume` says whether a resumed run may change it. Who forgets it gets the strict answer: no.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    legal = {key: value for key, value in limits.items() if value is not None}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "resume": resume, **legal})


def choices_of(field: dataclasses.Field[Any]) -> Choices:
    """The values that a setting may take, () = any."""
    choices: Choices | Callable[[], Choices] = field.metadata["choices"]
    return choices() if callable(choices) else choices


def broken_limit(field: dataclasses.Field[Any], value: Any) -> str:
    """The limit of a setting that this value breaks, as in ">= 1"; "" if it is legal."""
    for limit, words, holds in LIMITS:
        if limit in field.metadata and not holds(value, field.metadata[limit]):
            return f"{words} {field.metadata[limit]}"
    return ""
