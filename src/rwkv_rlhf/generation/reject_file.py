"""The output of reject sampling: CSV or JSONL that grows by whole rows, so that a run that was killed goes on with it.

Beside OUT stands OUT.json: which model sampled it and how. A run goes on only with the same. While it goes, each rank
has a file of what is known before its turn (part_files.py).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.files import AppendLog, Lines, parse_json, read_json_object, without_nan, write_json
from rwkv_rlhf.generation.part_files import PartFiles
from rwkv_rlhf.settings.shapes import CHOSEN, PROMPT, REJECT

log = logging.getLogger(__name__)

OURS = {*PROMPT, *CHOSEN, *REJECT}  # other columns pass through, in a CSV as text
Row = dict[str, Any]  # column -> value, as it stands in the file


class CsvRows:
    """Rows under a header; every value is text."""

    framing = Lines(quoted=True)

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)

    def head(self) -> bytes:
        """What an empty file begins with."""
        return self._text(self.columns)

    def encode(self, row: Row) -> bytes:
        """A whole line of the file (of a cell with line breaks, several)."""
        return self._text([row[name] for name in self.columns])

    def decode(self, data: bytes) -> list[Row]:
        """Finished rows; ValueError for another header or for what is no CSV."""
        text = data.decode("utf-8-sig")
        cells = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
        if cells and cells[0] != self.columns:
            raise ValueError(f"it has the columns {', '.join(cells[0])}, not {', '.join(self.columns)}")
        return [dict(zip(self.columns, row)) if len(row) == len(self.columns) else {} for row in cells[1:]]

    def row(self, values: Row) -> Row:
        """The row as it is read back. Raises ValueError for a value that is no cell."""
        out = {}
        for name in self.columns:
            value = values.get(name, "")
            if isinstance(value, list | dict) and name in OURS:
                raise ValueError(f"column {name} holds messages, which a CSV cannot: give an --output_csv *.jsonl")
            text = "" if value is None else value if isinstance(value, str) else json.dumps(without_nan(value))
            out[name] = text.encode(errors="replace").decode()  # half of a surrogate pair has no bytes
        return out

    @staticmethod
    def _text(cells: Sequence[str]) -> bytes:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # else a lone CR is not quoted, and ends a row
        return f"{buffer.getvalue()[:-2]}\n".encode(errors="replace")


class JsonRows:
    """One JSON object a line."""

    framing = Lines()

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)

    def head(self) -> bytes:
        """What an empty file begins with: nothing."""
        return b""

    def encode(self, row: Row) -> bytes:
        """A whole line of the file."""
        return (json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) + "\n").encode(
            "utf-8", errors="replace"
        )

    def decode(self, data: bytes) -> list[Row]:
        """Finished rows; ValueError for what is no JSONL."""
        rows = [parse_json(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        return [row if isinstance(row, dict) else {} for row in rows]

    def row(self, values: Row) -> Row:
        """The row as it is read back."""
        row: Row = json.loads(self.encode(values))
        return row


class RejectFile:
    """The output: finished rows in input order, whole rows at a time.

    Args:
        columns: of the output, one of REJECT among them.
        about: what made the rejects (model, settings), for OUT.json; None = neither written nor checked.
    """

    def __init__(self, path: str | os.PathLike[str], columns: list[str], about: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.about = about
        self.reject = next(name for name in REJECT if name in columns)
        self.rows = JsonRows(columns) if self.path.suffix.lower() == ".jsonl" else CsvRows(columns)
        self.log = AppendLog(self.path, self.rows.framing)

    @property
    def sidecar(self) -> Path:
        """OUT.json."""
        return self.path.with_name(self.path.name + ".json")

    def row(self, cells: Row, reject: Any) -> Row:
        """One output row: the input's cells with this reject."""
        return self.rows.row({**cells, self.reject: reject})

    def resume(self, inputs: Sequence[Row], anew: bool) -> int:
        """How many rows are there already, after repairing one cut off in the middle; makes the file if there is none.

        With `anew` a finished file is begun again. Raises ValueError when the file holds other rows than the input's
        `inputs`, or is not finished and was made by another model or with other settings.
        """
        found = self._finished() if self.path.exists() else None
        if not found or (anew and len(found) >= len(inputs)):
            self.log.begin(self.rows.head())
            self._sign()
            return 0
        other = "give another --output_csv, or remove it to begin again"
        if len(found) > len(inputs):
            raise ValueError(f"{self.path} has {len(found)} rows, the input has {len(inputs)}: {other}")
        for number, (row, cells) in enumerate(zip(found, inputs), 1):
            if row != self.row(cells, row.get(self.reject, "")):
                raise ValueError(f"{self.path} row {number} is not row {number} of the input: {other}")
        if len(found) < len(inputs):
            self._check_maker(other)
        return len(found)

    def _finished(self) -> list[Row]:
        """Whole rows of the file; what follows the last of them (a stop in the middle of a write) is cut off."""
        try:
            found = self.rows.decode(b"".join(self.log.records()))
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{self.path} cannot be continued ({error}): give another --output_csv, or remove it"
            ) from error
        if self.log.keep():
            log.info("%s: its last row was cut off; sampling it again", self.path)
        return found

    def _sign(self) -> None:
        if self.about is not None:
            write_json(self.sidecar, self.about)

    def _check_maker(self, other: str) -> None:
        """Raises ValueError when OUT.json names another model or other settings than this run's."""
        if self.about is None:
            return
        try:
            was = read_json_object(self.sidecar)
        except ValueError:  # there is none, or it is no such file
            log.warning(
                "%s: no %s says which model made it; assuming that it was this one", self.path, self.sidecar.name
            )
            self._sign()
            return
        mine = json.loads(json.dumps(self.about))
        changed = [name for name in mine if was.get(name) != mine[name]]
        if changed:
            some = ", ".join(f"{name} {was.get(name)!s:.16} (now {mine[name]!s:.16})" for name in changed[:3])
            raise ValueError(
                f"{self.path} is half finished and was sampled with other settings: {some}; give those, or {other}"
            )

    def append(self, rows: Sequence[Row]) -> None:
        """Adds finished rows, which are on the disk when this returns."""
        if rows:
            self.log.append(*map(self.rows.encode, rows))

    def parts(self, inputs: Sequence[Row]) -> PartFiles:
        """Where ranks keep what they sampled before its turn to be written: rejects by row."""
        return PartFiles(self.path, [self.about, list(inputs)])
