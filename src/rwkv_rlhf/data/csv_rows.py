"""Rows of CSV and TSV files, read as they come."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rwkv_rlhf.data.opened import opened
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import Columns, Row, not_utf8
from rwkv_rlhf.settings.counted import counted

_CELL = (1 << 31) - 1  # the csv module's own limit of 131072 characters is shorter than real answers
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']""")
_ARCHIVE = (b"PK\x03\x04", b"\x80\x02")  # of torch.save, new and old
_OTHER_DELIMITERS = (";", "\t")


class _CsvRow(NamedTuple):
    """The line where a row starts, its cells, and what is wrong with them."""

    line: int
    cells: list[str]
    problem: RowError | None


def _csv_rows(file: io.TextIOWrapper, delimiter: str) -> Iterator[_CsvRow]:
    """The rows that are not blank."""
    csv.field_size_limit(_CELL)
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # a quotation mark that nobody closes swallows the rest of the file: say how much
            lost = f", lines {line} to {reader.line_num}" if reader.line_num > line else ""
            sentence = f"not readable as CSV ({error}{lost}): is a quotation mark not closed or not doubled?"
            yield _CsvRow(line, [], RowError(sentence, f"unreadable{lost}"))
            continue
        if cells:
            yield _CsvRow(line, cells, not_utf8("".join(cells)))


def csv_columns(path: str | os.PathLike[str], cells: list[str]) -> list[str]:
    """Lower-case column names of a header; ValueError when one stands twice."""
    names = [cell.strip().lower() for cell in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{path}:1: the column {name} stands twice")
    return names


def cell_value(text: str, name: str) -> Any:
    """A cell's text, or the list of messages that it is the JSON (or Python) of.

    RowError for one that begins like a list of messages and is none.
    """
    if not _MESSAGES.match(text):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        mistake = error
    try:
        return ast.literal_eval(text.strip())  # what pandas writes of a list: literals only, nothing is run
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        sentence = f"the cell {name} begins like a list of messages and is none ({mistake})"
        raise RowError(sentence, "unreadable messages") from mistake


def _delimiter(file: io.BufferedReader, usual: str) -> str:
    """The usual delimiter, unless the header has none and has another one."""
    head = file.peek(1 << 16).split(b"\n", 1)[0].decode("utf-8", errors="replace")
    others = [mark for mark in _OTHER_DELIMITERS if mark in head]
    return others[0] if usual not in head and others else usual


def read_csv(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Rows of a CSV file in UTF-8 (a BOM is fine); quoted cells may hold line breaks, or messages as JSON.

    Args:
        columns: what must be there.

    Raises:
        ValueError: a missing column, or (unless the report skips) a row that cannot be read, with file and line.
    """
    return _read(path, report, columns, ",")


def read_tsv(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """As `read_csv`, with tabs between the cells."""
    return _read(path, report, columns, "\t")


def _read(path: str | os.PathLike[str], report: DataReport, columns: Columns, usual: str) -> Iterator[Row]:
    with opened(path) as file:
        if file.peek(4).startswith(_ARCHIVE):
            raise ValueError(f"{path}: a checkpoint or an archive, not a CSV")
        delimiter = _delimiter(file, usual)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = _csv_rows(text, delimiter)
        header = next(rows, _CsvRow(1, [], None))
        if header.problem:
            raise ValueError(f"{path}:{header.line}: {header.problem}")
        names = csv_columns(path, header.cells)
        for choices in columns:
            if not set(choices) & set(names):
                found = f"its columns are {', '.join(names)}" if names else "the file is empty"
                raise ValueError(f"{path}:{header.line}: the column {choices[0]} is missing; {found}")
        for number, row in enumerate(rows, 1):
            where = f"{path}:{row.line} (row {number})"
            report.rows += 1
            try:
                yield Row(where, _record(names, row))
            except RowError as error:
                report.bad(where, error)


def _record(names: list[str], row: _CsvRow) -> dict[str, Any]:
    if row.problem:
        raise row.problem
    if any(row.cells[len(names) :]):
        many = counted(len(row.cells), "cell")
        sentence = f"{many}, but the header has {len(names)}: is a comma or quotation mark not quoted?"
        raise RowError(sentence, "too many cells")
    cells = row.cells + [""] * (len(names) - len(row.cells))
    return {name: cell_value(cell, name) for name, cell in zip(names, cells)}
