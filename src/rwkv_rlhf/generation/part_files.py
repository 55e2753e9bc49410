"""OUT.part-<rank>: what each process of a command has sampled and not yet written to its output OUT.

It outlives the end of the process, so the same command goes on with it, on as many processes as it likes.
"""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from rwkv_rlhf.files import AppendLog, Lines, parse_json


class PartFile:
    """One process's file: a line with the key of the work, then one JSON list (row from 0, value) a line."""

    def __init__(self, path: Path, key: str) -> None:
        self.log = AppendLog(path, Lines(), f"{key}\n".encode())
        self.open = False

    def rows(self) -> dict[int, Any]:
        """What the file holds of this work by row; nothing when it belongs to another."""
        try:
            if not self.log.resume():
                return {}
            found = [parse_json(line) for line in self.log.records()]
            return {int(row): value for row, value in found}
        except (ValueError, TypeError):  # another run's, or damaged
            return {}

    def append(self, row: int, value: Any) -> None:
        """Adds one row, a JSON value, which is on the disk when this returns."""
        if not self.open:
            if self.rows():
                self.log.keep()
            else:
                self.log.begin()
            self.open = True
        self.log.append((json.dumps([row, value]) + "\n").encode())


class PartFiles:
    """Those of the output `path`. `work`: whatever the values depend on (input, model, settings), as JSON or text."""

    def __init__(self, path: Path, work: Any) -> None:
        told = json.dumps(work, sort_keys=True, default=str)
        self.path, self.key = path, hashlib.sha256(told.encode("utf-8", errors="replace")).hexdigest()

    def of(self, rank: int) -> PartFile:
        """The file of a process."""
        return PartFile(self.path.with_name(f"{self.path.name}.part-{rank}"), self.key)

    def _there(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    def found(self) -> dict[int, Any]:
        """The values by row that processes of the same work have left."""
        return {row: value for path in self._there() for row, value in PartFile(path, self.key).rows().items()}

    def remove(self) -> None:
        """Everything is written."""
        for path in self._there():
            path.unlink(missing_ok=True)
