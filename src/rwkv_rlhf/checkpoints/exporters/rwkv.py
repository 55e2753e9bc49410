"""A model as this program and RWKV-LM have it: `.pth`, `.safetensors`, or safetensors in shards."""

from __future__ import annotations

from pathlib import Path

from rwkv_rlhf.checkpoints.exporting import DTYPES, ExportedModel, ExportOptions
from rwkv_rlhf.checkpoints.tensor_files import write_tensors


def write_rwkv(model: ExportedModel, path: Path, options: ExportOptions) -> None:
    """Write `model` to `path`, all or nothing. Raises ValueError when it cannot be written."""
    tensors = model.read()
    dtype = DTYPES.get(options.dtype)
    write_tensors({name: tensors[name] if dtype is None else tensors[name].to(dtype) for name in model.shapes}, path)
