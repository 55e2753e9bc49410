"""Where a run writes what it saw: metrics.jsonl for programs, train_log.txt in the tradition's form for people."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object as a line; numbers that JSON has no word for are written as null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_records(path: Path, event: str) -> list[dict[str, Any]]:
    """Records of one kind, oldest first; [] where the file does not exist yet."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    return [record for record in records if record.get("event") == event]


def log_new_run(path: Path, settings: dict[str, Any]) -> None:
    """Open a run in train_log.txt: its time and every setting."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{settings}\n")


def log_epoch(path: Path, epoch: int, loss: float, rate: float) -> None:
    """One line per mini-epoch: number, mean loss, its exponential, learning rate, time, number."""
    perplexity = math.exp(min(loss, 700.0))
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{epoch} {loss:.6f} {perplexity:.4f} {rate:.8f} {datetime.datetime.now()} {epoch}\n")
