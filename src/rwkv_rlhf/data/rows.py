"""Rows of any file that holds records, as dictionaries with lower-case keys, and the place where each stands."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.sources import is_dataset_folder
from rwkv_rlhf.settings.formats import FORMATS, format_of_name
from rwkv_rlhf.settings.implementations import load

Columns = tuple[tuple[str, ...], ...]  # each one by the names that mean the same
_ESCAPED = re.compile("[\\udc80-\\udcff]")


class Row(NamedTuple):
    """Where a row stands (file:line), and its values by column."""

    where: str
    record: dict[str, Any]


def not_utf8(text: str) -> RowError | None:
    """RowError when `text` (decoded with surrogateescape) held bytes that are not UTF-8."""
    found = None if text.isascii() else _ESCAPED.search(text)
    if found is None:
        return None
    return RowError(f"byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8: save the file as UTF-8", "not UTF-8")


def rows_format(path: str | os.PathLike[str]) -> str:
    """The format of a file or folder that is read row by row, "" for any other."""
    if os.path.isdir(path):
        return "arrow" if is_dataset_folder(path) else ""
    found = format_of_name(path)
    return found if found and FORMATS[found].rows else ""


def read_rows(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """The rows of one file by its suffix, as CSV if that names none with rows; `columns` are those it must have."""
    name = rows_format(path) or "csv"
    read: Callable[[str | os.PathLike[str], DataReport, Columns], Iterator[Row]] = load(FORMATS[name].rows)
    return read(path, report, columns)


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file or folder that is read row by row."""
    return bool(rows_format(path))
