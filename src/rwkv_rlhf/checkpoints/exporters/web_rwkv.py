"""Safetensors files as web-rwkv and Ai00 read them (`.st`): RWKV-6 and 7 in float16, by names of web-rwkv.

| here | there |
|---|---|
| `time_faaaa`, `time_maa*` | `time_first`, `time_mix*` |
| low-rank factors `*_w1`, `*_w2`, `w1` to `v2` | the same, their last two dimensions interchanged |
"""

from __future__ import annotations

import re
from pathlib import Path

from rwkv_rlhf.checkpoints.exporting import (
    DTYPES,
    ExportedModel,
    ExportOptions,
    Part,
    made_one_by_one,
    taken,
    transposed,
)
from rwkv_rlhf.checkpoints.shards import write_safetensors

NAMES = {"time_faaaa": "time_first", "time_maa": "time_mix"}
FACTORS = re.compile(r"blocks\.\d+\.att\.(time_(maa|decay)_w[12]|[wavg][12])")


def write_web_rwkv(model: ExportedModel, path: Path, options: ExportOptions) -> None:
    """Write `model` as one file. Raises OSError."""
    parts = [part_of(name, options.dtype) for name in model.shapes]
    shapes = {part.name: part.made(model.shapes) for part in parts}
    write_safetensors(shapes, made_one_by_one(parts, model), path)


def part_of(name: str, dtype: str) -> Part:
    """The tensor `name` as it lies there."""
    theirs = name
    for own, new in NAMES.items():
        theirs = theirs.replace(own, new)
    return Part(theirs, (transposed if FACTORS.fullmatch(name) else taken)(name), DTYPES[dtype])
