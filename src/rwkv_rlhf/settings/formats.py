"""Which format of `tables.FORMATS` a file has, by its name or by the word of --data_type; no file is opened."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_rlhf.settings import tables


def format_of_word(word: str) -> str:
    """The format that a word of --data_type or a suffix without its dot names; "" for none."""
    found = (name for name, f in tables.FORMATS.items() if word == name or word in f.words or f".{word}" in f.suffixes)
    return next(found, "")


def format_of_name(path: str | os.PathLike[str]) -> str:
    """The format that the suffix of a path names; "" for none."""
    suffix = Path(path).suffix.lower()
    return next((name for name, facts in tables.FORMATS.items() if suffix in facts.suffixes), "")


def names_of_formats(kind: str) -> list[str]:
    """How files that can hold `kind` (text, pairs or rated) are named, for messages: .csv, .jsonl, binidx."""
    found = {name: facts.suffixes[0] for name, facts in tables.FORMATS.items() if kind in facts.holds}
    return [name if suffix == ".bin" else suffix for name, suffix in found.items()]
