"""Rows of parquet files, of Arrow files, and of folders that the datasets library saved; all need pyarrow."""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_rlhf.data.opened import pyarrow_for
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import Columns, Row
from rwkv_rlhf.files import check_readable, named_for_libraries, read_json_object

_ROWS = 1024  # read at a time
_FILE = b"ARROW1"  # what an Arrow file begins with that is no stream


def _pyarrow(path: str | os.PathLike[str]) -> Any:
    """The package with the parts that are used here, which it does not import by itself."""
    package = pyarrow_for(path)
    for part in ("ipc", "parquet"):
        importlib.import_module(f"pyarrow.{part}")
    return package


def read_parquet(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Rows of a parquet file, of which any column may have gaps."""
    check_readable(path)
    pyarrow = _pyarrow(path)
    try:
        with open(path, "rb") as file:  # its own opening knows UTF-8 names only
            table = pyarrow.parquet.ParquetFile(file)
            yield from _rows(path, table.iter_batches(batch_size=_ROWS), report)
    except (_Failed, pyarrow.ArrowException, OSError) as error:  # an OSError where the footer is damaged
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def read_arrow(path: str | os.PathLike[str], report: DataReport, columns: Columns = ()) -> Iterator[Row]:
    """Rows of an Arrow file (or stream, or Feather file), or of a folder that the datasets library saved."""
    for file in arrow_files(path):
        pyarrow = _pyarrow(file)
        try:
            with named_for_libraries(file) as name, pyarrow.memory_map(os.fspath(name)) as memory:
                whole = memory.read(len(_FILE)) == _FILE
                memory.seek(0)
                reader = pyarrow.ipc.open_file(memory) if whole else pyarrow.ipc.open_stream(memory)
                batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
                small = (batch.slice(at, _ROWS) for batch in batches for at in range(0, len(batch), _ROWS))
                yield from _rows(file, small, report)
        except (_Failed, pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not a readable Arrow file ({error})") from error


class _Failed(Exception):
    """A damaged file, or a value that Python has no form for."""


def _rows(path: str | os.PathLike[str], batches: Iterator[Any], report: DataReport) -> Iterator[Row]:
    number = 0
    while True:
        try:
            batch = next(batches, None)
            records = [] if batch is None else batch.to_pylist()
        except Exception as error:  # a damaged file raises nearly anything
            raise _Failed(str(error)) from error
        if batch is None:
            return
        for record in records:
            number += 1
            report.rows += 1
            cells = {key.strip().lower(): plain(item) for key, item in record.items()}
            yield Row(f"{path} row {number}", cells)


def plain(value: Any) -> Any:
    """A value as JSON has it: dates and times in ISO 8601, bytes as text (in hex if they are none), others as their
    text."""
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


def arrow_files(path: str | os.PathLike[str]) -> list[Path]:
    """The .arrow files of a saved data set in order, of several splits those of `train`; a file is itself.

    Raises ValueError for a folder without them, one without a split `train`, and one with an index of its rows, which
    only the datasets library reads.
    """
    folder = Path(path)
    if not folder.is_dir():
        check_readable(folder)
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if part.is_dir())
        if "train" not in splits:
            raise ValueError(f"{path}: name one of its splits: {', '.join(str(folder / split) for split in splits)}")
        folder = folder / "train"
    state = read_json_object(folder / "state.json") if (folder / "state.json").is_file() else {}
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{folder}: saved with an index of its rows: save it again after dataset.flatten_indices()")
    named = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    found = [folder / name for name in named if isinstance(name, str)] or sorted(folder.glob("*.arrow"))
    if not found:
        raise ValueError(f"{folder}: the folder holds no .arrow file")
    return found
