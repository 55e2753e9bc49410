"""What a flag that names data stands for: a file, a folder, a pattern, or several of them with weights.

`a.jsonl`, `folder`, `'logs/*.jsonl.gz'`, `a.jsonl:2,b.csv:0.5` (a weight says how often each row is used in a pass: of
0.5, every second row).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_rlhf.files import file_hash, fingerprint, refuse_same_file
from rwkv_rlhf.settings.formats import FORMATS, format_of_name

_WEIGHT = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")
_ARROW = ("dataset_dict.json", "dataset_info.json", "state.json")  # what the datasets library writes into a folder


class Source(NamedTuple):
    """One file (or a folder that is one data set), and how often each of its rows is used in a pass."""

    path: str
    weight: float = 1.0

    def copies(self) -> Iterator[int]:
        """How often the first row is used, the second, ...: evenly, so that n rows become n * weight."""
        row = 0
        while True:
            yield int((row + 1) * self.weight + 1e-9) - int(row * self.weight + 1e-9)
            row += 1


def is_dataset_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is what `save_to_disk` of the datasets library writes."""
    return any(os.path.isfile(os.path.join(path, name)) for name in _ARROW)


def sources_of(spec: str | os.PathLike[str]) -> list[Source]:
    """The files that `spec` stands for, in order; what names no pattern, folder or list is one file, there or not.

    Raises ValueError for a pattern or folder without data, and for a weight of 0.
    """
    text = os.fspath(spec)
    if "," not in text or os.path.exists(text):
        parts = [text]
    else:
        parts = [part.strip() for part in text.split(",") if part.strip()]
    found = []
    for part in parts:
        weight, match = 1.0, None if os.path.exists(part) else _WEIGHT.fullmatch(part)
        if match:
            part, weight = match[1], float(match[2])
            if not weight:
                raise ValueError(f"{match[0]}: a weight must be above 0")
        found += [Source(path, weight) for path in _files(part)]
    return found


def _files(part: str) -> list[str]:
    if os.path.isdir(part) and not is_dataset_folder(part):
        inside = sorted(Path(part).iterdir())
        found = [str(p) for p in inside if p.is_dir() and is_dataset_folder(p)]
        found += [str(p) for p in inside if p.is_file() and p.name[0] != "." and _is_data(p)]
        if not found:
            legal = ", ".join(facts.suffixes[0] for facts in FORMATS.values() if facts.rows)
            raise ValueError(f"{part}: the folder holds no file of data ({legal}, each also .gz and .zst)")
        return found
    if any(c in part for c in "*?[") and not os.path.exists(part):
        found = sorted(glob.glob(part, recursive=True))
        if not found:
            raise ValueError(f"{part}: no file has a name like this")
        return found
    return [part]


def _is_data(path: Path) -> bool:
    name = format_of_name(path)
    return bool(name and (FORMATS[name].rows or FORMATS[name].text) and path.suffix != ".idx")


def refuse_sources(spec: str | os.PathLike[str], target: str | os.PathLike[str], flag: str) -> None:
    """Raises ValueError, naming `flag`, when `target` is one of the input files."""
    for source in sources_of(spec):
        refuse_same_file(source.path, target, flag)


def _identity(spec: str, of_file: Callable[[str], str]) -> Iterator[str]:
    """What `of_file` says of each file that `spec` stands for, with its weight where it has one."""
    for source in sources_of(spec):
        inside = sorted(map(str, Path(source.path).rglob("*.arrow"))) if os.path.isdir(source.path) else []
        weight = "" if source.weight == 1 else f" x {source.weight:g}"
        yield "; ".join(map(of_file, inside or [source.path])) + weight


def fingerprint_of(spec: str) -> str:
    """What tells the data behind a flag from other data; of one file its fingerprint."""
    return " + ".join(_identity(spec, fingerprint))


def content_of(spec: str) -> str:
    """The hashes of all files behind a flag; ValueError for one that cannot be read."""
    return "".join(_identity(spec, file_hash))
