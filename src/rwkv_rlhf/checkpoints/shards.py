"""Safetensors written one tensor after the other, in one file or in shards with an index, and shards read again.

A model in shards is `NAME.safetensors.index.json`, which says of each tensor which file beside it holds it. The layout
is Hugging Face's: `weight_map` by names, and `total_size` in bytes.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rwkv_rlhf.checkpoints.tensor_tree import safetensors_head, tensor_bytes
from rwkv_rlhf.files import SHARDS_INDEX, named_for_libraries, read_json_object, sharded_files, write_json
from rwkv_rlhf.settings.counted import predicated

Tensors = Mapping[str, Tensor]
SHARD_SIZE = 4 << 30  # bytes of a shard
WAITING = ".new-"  # before the name of a checkpoint that is to take an older one's place
METADATA = {"format": "pt"}  # without it transformers does not read a file


def read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of a model in shards. Raises ValueError, OSError or SafetensorError for one that is not whole."""
    found: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for file in sharded_files(path):
        if file.suffix == ".safetensors":
            with named_for_libraries(file) as name:
                found |= load_file(name)
        else:
            named = read_json_object(file)["weight_map"]
    lost = [name for name in named if name not in found]
    if lost:
        raise ValueError(
            f"{path}: {predicated(len(lost), 'tensor', 'are in the index and in none of its files')}, such as {lost[0]}"
        )
    return found


def write_safetensors(shapes: Tensors, tensors: Iterator[Tensor], path: Path) -> None:
    """Write a safetensors file of the names, shapes and dtypes of `shapes`; `tensors` gives them in the same order.

    Only one of them is in memory at a time. Raises OSError.
    """
    with open(path, "wb") as file:
        file.write(safetensors_head(shapes, METADATA))
        for name, shape in shapes.items():
            tensor = next(tensors)
            assert (tensor.shape, tensor.dtype) == (shape.shape, shape.dtype), name
            file.write(memoryview(tensor_bytes(tensor)))
        file.flush()
        os.fsync(file.fileno())


def write_shards(
    shapes: Tensors, tensors: Iterator[Tensor], folder: Path, name: str, shard_size: int = SHARD_SIZE
) -> list[Path]:
    """Write `name`.safetensors into `folder`, or shards of at most `shard_size` bytes and their index.

    Returns the files, the index last. As `write_safetensors`. A tensor that is larger has a shard of its own.
    """
    parts = list(split(shapes, shard_size))
    if len(parts) == 1:
        write_safetensors(shapes, tensors, folder / f"{name}.safetensors")
        return [folder / f"{name}.safetensors"]
    return write_indexed(parts, tensors, folder / f"{name}{SHARDS_INDEX}", name)


def write_indexed(parts: Sequence[Tensors], tensors: Iterator[Tensor], index: Path, name: str) -> list[Path]:
    """Write one shard for each of `parts`, called after `name`, then the index; returns the files, it last."""
    files = [index.with_name(f"{name}-{n:05}-of-{len(parts):05}.safetensors") for n in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(part, tensors, file)
    where = {tensor: file.name for file, part in zip(files, parts, strict=True) for tensor in part}
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
    return [*files, index]


def write_sharded(tensors: Tensors, index: Path, shard_size: int = SHARD_SIZE) -> None:
    """Write the model in shards `index`, all or nothing, in the place of an older one.

    Shards have names that nothing else has, and the index is what puts them into force: a kill leaves the older model.
    Raises OSError, and ValueError when the index cannot be written.
    """
    stem = stem_of(index)
    name = f"{stem}-{os.urandom(4).hex()}"
    index.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_indexed(list(split(tensors, shard_size)), iter(tensors.values()), index, name)
    except BaseException:
        for file in index.parent.glob(f"{glob.escape(name)}-*.safetensors"):
            file.unlink()
        raise
    remove_old_shards(index)


def stem_of(index: Path) -> str:
    """What the shards of a model are called after; one that waits to take an older one's place has its name already."""
    return index.name.removesuffix(SHARDS_INDEX).removeprefix(WAITING)


def remove_old_shards(index: Path) -> None:
    """Remove the shards that `write_sharded` wrote for an older model of this name."""
    own = index.name.removeprefix(WAITING)
    indexes = [index.with_name(name) for name in (own, f"{WAITING}{own}")]
    try:
        kept = {file for each in indexes if each.exists() for file in sharded_files(each)}
    except ValueError:
        return  # an index that nobody can read: who knows what it named
    mark = re.compile(rf"{re.escape(stem_of(index))}-[0-9a-f]{{8}}-\d{{5}}-of-\d{{5}}\.safetensors")
    for file in index.parent.iterdir():
        if mark.fullmatch(file.name) and file not in kept:
            file.unlink(missing_ok=True)


def split(shapes: Tensors, shard_size: int) -> Iterator[dict[str, Tensor]]:
    """`shapes` in the same order, in pieces of at most `shard_size` bytes or one tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in shapes.items():
        more = tensor.nbytes
        if part and size + more > shard_size:
            yield part
            part, size = {}, 0
        part[name], size = tensor, size + more
    yield part
