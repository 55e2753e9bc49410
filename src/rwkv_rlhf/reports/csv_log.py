"""metrics.csv: the records of a run as a table, a row a record; spreadsheets and pandas read it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.reports.logger import ABOUT, TRAINING, numbers
from rwkv_rlhf.reports.metrics import METRICS, read_records

CSV = "metrics.csv"


class CsvLog:
    """Begins with what metrics.jsonl holds of the run. A figure that is new widens the table."""

    name = CSV

    def __init__(self, folder: Path) -> None:
        self.path, self._columns = folder / CSV, list[str]()
        self._known = folder / METRICS

    def add(self, record: dict[str, Any]) -> None:
        """One more row."""
        if not self._columns:
            self._rewrite(read_records(self._known, "start", TRAINING, "val", "tasks"), record)
        elif not numbers(record).keys() <= {*self._columns}:
            with open(self.path, newline="", encoding="utf-8") as file:
                self._rewrite([*csv.DictReader(file)], record)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(self._lines([self._row(record)]))

    def close(self) -> None:
        """Nothing is open."""

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        return {name: record.get(name) for name in ABOUT} | numbers(record)

    def _rewrite(self, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
        """The table with these rows (records, or what was read of it), and with columns for `more`."""
        found = [row if "tasks" not in row else self._row(row) for row in rows]
        self._columns = [
            *dict.fromkeys(name for row in (dict.fromkeys(ABOUT), *found, self._row(more)) for name in row)
        ]
        with atomic_write(self.path) as file:
            file.write((self._lines([dict(zip(self._columns, self._columns))]) + self._lines(found)).encode())

    def _lines(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()
