"""Where a run writes what it saw: metrics.jsonl for programs, train_log.txt in the tradition's form for people."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from rwkv_rlhf.files import atomic_write, without_nan

METRICS = "metrics.jsonl"


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object as a line; numbers that JSON has no word for are written as null."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"  # an earlier run was killed in the middle of a line
            file.seek(0, os.SEEK_END)
            file.write(b"\n" if torn else b"")
        file.write((json.dumps(without_nan(record), allow_nan=False) + "\n").encode())


def read_records(path: Path, *events: str) -> list[dict[str, Any]]:
    """Records of the last run of some kinds, oldest first; [] where there is no file yet.

    Lines that were never finished are left out.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") == "begin":
            records.clear()
        if isinstance(record, dict) and record.get("event") in events:
            records.append(record)
    return records


def drop_after(path: Path, size: int, beginnings: tuple[str, ...]) -> None:
    """Forget lines that begin like that behind the first `size` bytes: a run that is resumed writes them again."""
    content = path.read_bytes() if path.exists() else b""
    behind = content[size:].splitlines(keepends=True)
    left = [line for line in behind if not line.startswith(tuple(word.encode() for word in beginnings))]
    if left != behind:
        with atomic_write(path) as file:
            file.write(content[:size] + b"".join(left))


def log_new_run(path: Path, settings: dict[str, Any]) -> None:
    """Open a run in train_log.txt: its time and every setting."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{settings}\n")


def log_epoch(path: Path, epoch: int, loss: float, rate: float) -> None:
    """One line per mini-epoch: number, mean loss, its exponential, learning rate, time, number."""
    perplexity = math.exp(min(loss, 700.0))
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{epoch} {loss:.6f} {perplexity:.4f} {rate:.8f} {datetime.datetime.now()} {epoch}\n")
