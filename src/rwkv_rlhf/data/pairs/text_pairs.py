"""Preference pairs as text: a conversation and two answers, out of any file that holds them row by row."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import has_rows
from rwkv_rlhf.data.shapes.record import Item, Pair
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.settings.formats import names_of_formats


@dataclass(frozen=True)
class TextPair:
    """Normalised text: the turns before the answer, both answers (reject is empty where there is none), and where.

    margin: by how much the row rates the chosen answer higher, None where it does not say.
    """

    turns: tuple[Turn, ...]
    chosen: str
    reject: str
    where: str
    margin: float | None = None


def text_pair(item: Item, where: str) -> TextPair:
    """The pair that a row holds."""
    assert isinstance(item, Pair)
    return TextPair(item.turns, item.chosen, item.reject, where, item.margin)


def _tie(pair: Pair, report: DataReport, drop: bool) -> bool:
    """Whether to leave out a row whose answers were scored the same; odd scores are remarked."""
    chosen, reject = pair.scores
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


def check_has_rows(path: str | os.PathLike[str]) -> None:
    """Raises ValueError when one of the files that `path` stands for is not read row by row."""
    for source in sources_of(path):
        if not has_rows(source.path):
            legal = ", ".join(names_of_formats("rated"))  # those with rows
            raise ValueError(f"{source.path}: not a file of preference pairs; one of {legal} (or .save)")


def read_pairs(
    path: str | os.PathLike[str], report: DataReport, drop_ties: bool = False, reading: Reading | None = None
) -> Iterator[TextPair]:
    """Pairs of files that are read row by row, normalised and checked.

    Args:
        report: counts rows and skips; its `skip_bad` decides between an error and a counted skip.
        drop_ties: rows whose answers have the same score (score_chosen, score_rejected) are left out and counted.
        reading: how records are read.

    Raises:
        ValueError: with file, line and what is wrong.
    """
    check_has_rows(path)
    seen: set[int] = set()
    last, pair = None, None
    for where, item, _ in read_items(path, report, ("pairs",), reading):
        if item is last:  # of a file with a weight: the same row again
            if pair is not None:
                yield pair
            continue
        assert isinstance(item, Pair)
        last, pair = item, None
        if _tie(item, report, drop_ties):
            continue
        pair = text_pair(item, where)
        key, swapped = hash((pair.turns, pair.chosen, pair.reject)), hash((pair.turns, pair.reject, pair.chosen))
        report.remark("repeat another one", key in seen)
        report.remark("say the opposite of another one", swapped in seen)
        seen.add(key)
        yield pair
