"""Rows of CSV, JSONL and parquet files as dictionaries with lower-case keys, and the place where each stands."""

import csv
import datetime
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.files import check_readable, parse_json, read_bytes
from rwkv_rlhf.settings.formats import FORMATS, format_of_name
from rwkv_rlhf.settings.implementations import load

Columns = tuple[tuple[str, ...], ...]  # each one by the names that mean the same
_CELL = (1 << 31) - 1  # the csv module's own limit of 131072 characters is shorter than real answers
_ARCHIVE = (b"PK\x03\x04", b"\x80\x02")  # of torch.save, new and old
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """Where a row stands (file:line), and its values by column."""

    where: str
    record: dict[str, Any]


def _not_utf8(text: str) -> RowError | None:
    """RowError when `text` (decoded with surrogateescape) held bytes that are not UTF-8."""
    for character in text:
        if "\udc80" <= character <= "\udcff":
            return RowError(f"byte 0x{ord(character) - 0xDC00:02x} is not UTF-8: save the file as UTF-8", "not UTF-8")
    return None


class _CsvRow(NamedTuple):
    """The line where a row starts, its cells, and what is wrong with them."""

    line: int
    cells: list[str]
    problem: RowError | None


def _csv_rows(text: str) -> Iterator[_CsvRow]:
    """The rows that are not blank."""
    csv.field_size_limit(_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
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
            yield _CsvRow(line, cells, _not_utf8("".join(cells)))


def csv_columns(path: str | os.PathLike[str], cells: list[str]) -> list[str]:
    """Lower-case column names of a header; ValueError when one stands twice."""
    names = [cell.strip().lower() for cell in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{path}:1: the column {name} stands twice")
    return names


def read_csv(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Rows of a CSV file in UTF-8 (a BOM is fine); quoted cells may hold line breaks.

    Args:
        columns: what must be there.

    Raises:
        ValueError: a missing column, or (unless the report skips) a row that cannot be read, with file and line.
    """
    data = read_bytes(path)
    if data.startswith(_ARCHIVE):
        raise ValueError(f"{path}: a checkpoint or an archive, not a CSV")
    text = data.removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
    rows = _csv_rows(text)
    header = next(rows, _CsvRow(1, [], None))
    if header.problem:
        raise ValueError(f"{path}:{header.line}: {header.problem}")
    names = csv_columns(path, header.cells)
    for choices in columns:
        if not set(choices) & set(names):
            found = f"its columns are {', '.join(names)}" if names else "the file is empty"
            if len(names) == 1 and {*";\t"} & {*names[0]}:
                found += "; columns are separated by commas: save it so"
            raise ValueError(f"{path}:{header.line}: the column {choices[0]} is missing; {found}")
    for number, (line, cells, problem) in enumerate(rows, 1):
        where = f"{path}:{line} (row {number})"
        report.rows += 1
        if not problem and any(cells[len(names) :]):
            sentence = f"{len(cells)} cells, but the header has {len(names)}: is a comma or quotation mark not quoted?"
            problem = RowError(sentence, "too many cells")
        if problem:
            report.bad(where, problem)
        else:
            yield Row(where, dict(zip(names, cells + [""] * (len(names) - len(cells)))))


def read_jsonl(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Objects of a JSONL file, one a line, blank lines left out; keys in lower case. Each has `columns` of its own.

    Raises:
        ValueError: a missing file, or (unless the report skips) a line that is no JSON object, with file and line.
    """
    check_readable(path)
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(_BOM) if line == 1 else raw
            if not raw.strip():
                continue
            report.rows += 1
            try:
                yield Row(f"{path}:{line}", _json_object(raw))
            except RowError as error:
                report.bad(f"{path}:{line}", error)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8", "not UTF-8") from error
    except ValueError as error:
        raise RowError(f"not a JSON object ({error})", "unreadable") from error
    if not isinstance(value, dict):
        raise RowError(f"a JSON object is needed, this is a {type(value).__name__}", "unreadable")
    return {key.strip().lower(): item for key, item in value.items()}


def read_parquet(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Rows of a parquet file, of which any column may have gaps; needs pyarrow."""
    check_readable(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        with open(path, "rb") as file:  # its own opening knows UTF-8 names only
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for record in batch.to_pylist():
                    report.rows += 1
                    cells = {key.strip().lower(): plain(item) for key, item in record.items()}
                    yield Row(f"{path} row {report.rows}", cells)
    except Exception as error:  # a damaged file, or a value that Python has no form for, raises nearly anything
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def plain(value: Any) -> Any:
    """A parquet value as JSON has it: dates and times in ISO 8601, bytes as text (in hex if they are none), others as
    their text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def read_rows(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """The rows of a file by its suffix, as CSV if that names no format with rows; `columns` are those it must have."""
    read: Callable[[str | os.PathLike[str], DataReport, Columns], Iterator[Row]] = read_csv
    if has_rows(path):
        read = load(FORMATS[format_of_name(path)].rows)
    return read(path, report, columns)


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix of a path names a format that is read row by row."""
    found = format_of_name(path)
    return bool(found and FORMATS[found].rows)
