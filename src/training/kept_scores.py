"""Reference scores that survive a kill: appended to a file row by row of packed pairs, taken up by the next run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.batch import PairExample
from src.files import atomic_write
from src.model.rwkv import RWKV
from src.training.evaluate import pair_rows, score_pairs

log = logging.getLogger(__name__)


class KeptScores:
    """A text file: the key of model, pairs and arithmetic, then one JSON list of (chosen, reject) sums per packed row.

    Rows of the file are whole: one that was cut off by a kill is scored again. Sums are written so that the float32
    read back is the float32 computed, and rows are packed as in an unbroken run, so the end is the same to the bit.
    """

    def __init__(self, path: str | os.PathLike, key: str) -> None:
        self.path, self.key = Path(path), key

    def _read(self) -> list[list[list[float]]]:
        """Finished rows of an earlier run with the same key; the file is begun anew if it has another."""
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        if not lines or lines[0] != self.key.encode():
            with atomic_write(self.path) as file:
                file.write(f"{self.key}\n".encode())
            return []
        if not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)
        return [json.loads(line) for line in lines[1:]]

    def score(self, model: RWKV, pairs: Sequence[PairExample], chunk: int = 1024, progress: Any = None) -> Tensor:
        """(n, 2) float32 summed log-probabilities of (chosen, reject), those on disk as they are."""
        found = self._read()
        if found:
            log.info("%s: %d of %d pairs were scored by an earlier run", self.path, sum(map(len, found)), len(pairs))
        for number, row in enumerate(pair_rows(pairs)):
            if number >= len(found):
                sums, _ = score_pairs(model, row, chunk)
                found.append(sums.tolist())
                with open(self.path, "ab") as file:
                    file.write((json.dumps(found[-1]) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
            assert len(found[number]) == len(row), (number, len(found[number]), len(row))
            if progress is not None:
                progress(len(row))
        return torch.tensor([sums for row in found for sums in row], dtype=torch.float32)

    def forget(self) -> None:
        """Removes the file when its scores have gone where they belong."""
        self.path.unlink(missing_ok=True)
