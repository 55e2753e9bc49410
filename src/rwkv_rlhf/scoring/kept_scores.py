"""Reference scores that survive a kill: appended to a file row by row of packed pairs, taken up by the next run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.files import AppendLog, Lines, OtherHead
from rwkv_rlhf.losses.tokens import HEAD_CHUNK
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.evaluation import pair_rows, score_pairs
from rwkv_rlhf.scoring.finite import refuse_not_finite

log = logging.getLogger(__name__)


class KeptScores:
    """A text file: the key of model, pairs and arithmetic, then one JSON list of (chosen, reject) sums per packed row.

    Sums are written so that the float32 read back is the float32 computed, and rows are packed as in an unbroken run,
    so the end is the same to the bit.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self.log = AppendLog(path, Lines(), f"{key}\n".encode())

    def finished(self, sizes: Sequence[int]) -> list[list[list[float]]]:
        """Rows of an earlier run with the same key, of `sizes` pairs each; the file is begun anew if it has another.

        What was cut off or damaged is removed, with what follows it, and scored again.
        """
        try:
            there = self.log.resume()
        except OtherHead:
            log.info("%s: scores of another model, of other pairs or of an older version; begun anew", self.log.path)
            there = False
        if not there:
            self.log.begin()
        rows = []
        for line, size in zip(self.log.records(), sizes):
            row = _sums(line, size)
            if row is None:
                break
            rows.append(row)
        if self.log.keep(len(rows)):
            log.info("%s: row %d is cut off or damaged; scoring goes on from it", self.log.path, len(rows) + 1)
        return rows

    def score(
        self,
        model: RWKV,
        pairs: Sequence[PairExample],
        head_chunk: int = HEAD_CHUNK,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """(n, 2) float32 summed log-probabilities of (chosen, reject), those on disk as they are."""
        wanted = list(pair_rows(pairs))
        found = self.finished([len(row) for row in wanted])
        if found:
            log.info(
                "%s: %d of %d pairs were scored by an earlier run", self.log.path, sum(map(len, found)), len(pairs)
            )
        for number, row in enumerate(wanted):
            if number >= len(found):
                sums = score_pairs(model, row, head_chunk=head_chunk).sums()
                refuse_not_finite("a reference score", sums, model)
                found.append(sums.tolist())
                self.log.append(f"{json.dumps(found[-1])}\n".encode())
            if progress is not None:
                progress(len(row))
        return torch.tensor([sums for row in found for sums in row], dtype=torch.float32)

    def forget(self) -> None:
        """Removes the file when its scores have gone where they belong."""
        self.log.remove()


def _sums(line: bytes, size: int) -> list[list[float]] | None:
    """The (chosen, reject) sums of `size` pairs in a line of the file, None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    pairs = isinstance(row, list) and len(row) == size and all(isinstance(p, list) and len(p) == 2 for p in row)
    return row if pairs and all(type(x) is float and math.isfinite(x) for p in row for x in p) else None
