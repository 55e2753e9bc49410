"""Objects of JSON files, read as they come: one a line, or in one array, or one below the other over several lines."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from rwkv_rlhf.data.opened import opened
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import Columns, Row, not_utf8
from rwkv_rlhf.files import parse_json

_BOM = codecs.BOM_UTF8
_BLOCK = 1 << 20  # bytes read at a time
_LONGEST_TOKEN = 16  # a mistake so near the end of what was read may be only the end of it: `tru`, `"\\u12`
_SPACE = re.compile(r"\s*")


def read_jsonl(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Objects of a JSON file; keys in lower case. Memory does not grow with the file.

    Raises:
        ValueError: a missing file, or (unless the report skips) what is no JSON object, with file and line.
    """
    with opened(path) as file:
        begin = file.peek(_BLOCK).removeprefix(_BOM).lstrip()
        if begin[:1] == b"[" or _is_spread(begin):
            yield from _values(path, file, report)
        else:
            yield from _lines(path, file, report)


def _is_spread(begin: bytes) -> bool:
    """Whether the first object goes on behind the first line."""
    first, _, rest = begin.partition(b"\n")
    return bool(rest.strip()) and first.strip()[-1:] in (b"{", b"[", b",", b":")


def _lines(path: str | os.PathLike[str], file: io.BufferedReader, report: DataReport) -> Iterator[Row]:
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
    return _record(value)


def _record(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"a JSON object is needed, this is a {type(value).__name__}", "unreadable")
    return {key.strip().lower(): item for key, item in value.items()}


def _values(path: str | os.PathLike[str], file: io.BufferedReader, report: DataReport) -> Iterator[Row]:
    """The elements of an array, or objects one below the other."""
    stream, number = _Stream(file), 0
    inside = stream.take("[")
    while True:
        if stream.next() in ("", "]"):
            break
        number += 1
        report.rows += 1
        where = f"{path}:{stream.line} (element {number})"
        try:
            value, text = stream.value()
        except ValueError as error:
            report.bad(where, RowError(f"not a JSON object ({error})", "unreadable, and what follows it in the array"))
            return
        try:
            if problem := not_utf8(text):
                raise problem
            yield Row(where, _record(value))
        except RowError as error:
            report.bad(where, error)
        if not stream.take(",") and inside and stream.next() not in ("", "]"):
            sentence = "not a JSON object (a comma is missing behind it)"
            report.bad(where, RowError(sentence, "unreadable, and what follows it in the array"))
            return
    if inside and not stream.take("]"):
        sentence = "the array is not closed: the file is cut off"
        report.bad(f"{path}:{stream.line}", RowError(sentence, "cut off"))


class _Stream:
    """JSON values out of a file of which only the value that is read next must fit into memory."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._json = json.JSONDecoder()
        self._more(_BLOCK)

    def _more(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self._decoder.decode(data, final=self.ended), 0

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._move(match.end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more(_BLOCK)

    def take(self, mark: str) -> bool:
        """Whether the next character is `mark`; then it is behind us."""
        if self.next() != mark:
            return False
        self._move(self.at + 1)
        return True

    def value(self) -> tuple[Any, str]:
        """The next value and its text. Raises ValueError for what is none."""
        size = _BLOCK
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise ValueError("nested too deeply") from error
            except json.JSONDecodeError as error:
                open_text = error.msg.startswith("Unterminated string")
                if self.ended or not (open_text or error.pos >= len(self.text) - _LONGEST_TOKEN):
                    line = self.line + error.lineno - 1 - self.text.count("\n", 0, self.at)
                    raise ValueError(f"{error.msg}, line {line}") from error
            else:
                if end < len(self.text) or self.ended or isinstance(value, dict | list):
                    text = self.text[self.at : end]
                    self._move(end)
                    return value, text
            self._more(size)
            size *= 2  # so that a long value is tried a few times only
