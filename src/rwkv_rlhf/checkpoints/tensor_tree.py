"""A file of tensors and plain values: safetensors, with the values as JSON in its header; hashed while it is written.

Written by hand because a background thread writes it: bytes go from memory to the file and into the hash in pieces,
without a copy and without holding Python's lock. The format is that of the safetensors page (8 bytes of length, JSON
header with dtype, shape and offsets, then the data); any safetensors reader opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkv_rlhf.files import named_for_libraries

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 8 << 20  # bytes that are hashed and written at a time
VALUES = "values"  # the key of the plain values in the header's metadata


def flatten(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """`value` as JSON can hold it; its tensors go to `tensors` under their place in it ("optimizer/state/0/exp_avg").

    Legal are tensors, dicts (with keys of text or whole numbers), lists, tuples, numbers, text, truth values and None.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, flatten(entry, tensors, f"{name}/{key}".lstrip("/"))] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(entry, tensors, f"{name}/{at}") for at, entry in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{name}: {type(value).__name__}"
    return value


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: unflatten(entry, tensors) for key, entry in inner}
    entries = [unflatten(entry, tensors) for entry in inner]
    return entries if kind == "list" else tuple(entries)


def write_tree(tree: Any, path: Path) -> str:
    """Write tensors and values to the new file `path`, to the disk itself; returns its SHA-256.

    Raises OSError.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(flatten(tree, tensors))
    head = safetensors_head(tensors, {VALUES: values})
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        views = (memoryview(tensor_bytes(tensor)) for tensor in tensors.values())
        for view in (memoryview(head), *views):
            for begin in range(0, len(view), PIECE):
                piece = view[begin : begin + PIECE]
                digest.update(piece)
                while piece:  # a single write() may take less than it is given, and none of what does not fit
                    piece = piece[os.write(file.fileno(), piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def safetensors_head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the bytes of `tensors` (which may be on the meta device) follow in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a flat array of numpy, without a copy where it lies in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote, in memory of its own. Raises ValueError when it is no such file."""
    try:
        with named_for_libraries(path) as name, safe_open(name, framework="pt") as file:
            # the tensors are changed in place later: never in the file's own pages
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return unflatten(json.loads(file.metadata()[VALUES]), tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as part of a resume point ({type(error).__name__})") from error
