"""Reference scores that survive a kill: appended to a file row by row of packed pairs, taken up by the next run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.losses.tokens import HEAD_CHUNK
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.evaluation import pair_rows, score_pairs

log = logging.getLogger(__name__)


class KeptScores:
    """A text file: the key of model, pairs and arithmetic, then one JSON list of (chosen, reject) sums per packed row.

    Rows of the file are whole: one that was cut off by a kill is scored again. Sums are written so that the float32
    read back is the float32 computed, and rows are packed as in an unbroken run, so the end is the same to the bit.
    """

    def __init__(self, path: str | os.PathLike, key: str) -> None:
        self.path, self.key = Path(path), key

    def finished(self, sizes: Sequence[int]) -> list[list[list[float]]]:
        """Rows of an earlier run with the same key, of `sizes` pairs each; the file is begun anew if it has another.

        What was cut off or damaged is removed, with what follows it, and scored again.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        first, *lines = data[: data.rfind(b"\n") + 1].split(b"\n")
        if first != self.key.encode() or not lines:
            with atomic_write(self.path) as file:
                file.write(f"{self.key}\n".encode())
            return []
        rows, end = [], len(first) + 1
        for line, size in zip(lines, sizes):
            row = _sums(line, size)
            if row is None:
                break
            rows.append(row)
            end += len(line) + 1
        if end < len(data):
            log.info("%s: from row %d on it is cut off or damaged; scoring that again", self.path, len(rows) + 1)
            os.truncate(self.path, end)
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
            log.info("%s: %d of %d pairs were scored by an earlier run", self.path, sum(map(len, found)), len(pairs))
        for number, row in enumerate(wanted):
            if number >= len(found):
                found.append(score_pairs(model, row, head_chunk=head_chunk).sums().tolist())
                with open(self.path, "ab") as file:
                    file.write((json.dumps(found[-1]) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
            if progress is not None:
                progress(len(row))
        return torch.tensor([sums for row in found for sums in row], dtype=torch.float32)

    def forget(self) -> None:
        """Removes the file when its scores have gone where they belong."""
        self.path.unlink(missing_ok=True)


def _sums(line: bytes, size: int) -> list[list[float]] | None:
    """The (chosen, reject) sums of `size` pairs in a line of the file, None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    pairs = isinstance(row, list) and len(row) == size and all(isinstance(p, list) and len(p) == 2 for p in row)
    return row if pairs and all(type(x) is float and math.isfinite(x) for p in row for x in p) else None
