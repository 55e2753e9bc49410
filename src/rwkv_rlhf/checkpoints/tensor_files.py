"""Files of named tensors: reading them safely, comparing them, writing them atomically.

A checkpoint is a flat dict of tensors, `.pth` (torch.save), `.safetensors`, or several of these with an index (shards).
Only tensors are ever read from one. RWKV-7 in Hugging Face's layout is read too, by this program's names.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_rlhf.checkpoints.hf_layout import is_hf, own_tensors
from rwkv_rlhf.checkpoints.shards import read_shards, write_sharded
from rwkv_rlhf.files import (
    LFS,
    SHARDS_INDEX,
    atomic_write,
    check_archive,
    is_sharded,
    named_for_libraries,
    refuse_pointer,
    sharded_files,
)
from rwkv_rlhf.settings import tables

log = logging.getLogger(__name__)

# what Lightning, DeepSpeed, DDP and torch.compile put before names, and torch.compile inside them too
WRAPPED = re.compile(r"^((?:_forward_module|module|model)\.)+|_orig_mod\.")
USUAL = {"_forward_module."}  # in checkpoints of RWKV-LM, not worth a word
DISHA = {2: "miss", 3: "bone"}  # what RWKV-PEFT calls `disha`, by the axes of the tensor
NAMES_SHOWN = 4
SHARED = 8  # times that the bytes of a file may be used, by tensors that share them


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, mapped from the disk and not read yet where possible.

    path: a `.pth` or `.safetensors` file, the index of shards, or a folder with a model in safetensors. Nothing in it
    is executed. Raises ValueError in one sentence for a file that is missing, cut off, damaged, holds other objects
    than tensors, or is not a dict.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        found = _read(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(found, dict) or not found:
        what = "an empty dict" if found == {} else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {what}, expected a dict of named tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} is not a dict of named tensors: entry {name!r} is a {type(value).__name__}")
    _check_plain(found, path)
    if is_hf(found):
        try:
            found = own_tensors(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return {name: value.detach() for name, value in _unwrapped(found, path).items()}


def _unwrapped(tensors: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """The tensors without what wrappers of the model put before their names, and DiSHA's by the name that they have
    here. ValueError where two fall together."""
    plain: dict[str, Tensor] = {}
    wrappers: set[str] = set()
    for name, tensor in tensors.items():
        wrappers.update(match[0] for match in WRAPPED.finditer(name))
        own = WRAPPED.sub("", name)
        layer, _, last = own.rpartition(".")
        if last == "disha" and tensor.dim() in DISHA:
            own = f"{layer}.{DISHA[tensor.dim()]}"
        if own in plain:
            raise ValueError(f"{path} holds {own} twice, with and without a prefix of its name")
        plain[own] = tensor
    if strange := sorted(wrappers - USUAL):
        _say_wrappers(str(path), ", ".join(strange))
    return plain


@functools.cache  # a file is opened again for each block
def _say_wrappers(path: str, wrappers: str) -> None:
    log.warning("%s: names without %s, which another trainer put before them", path, wrappers)


def _read(path: Path) -> object:
    for file in sharded_files(path) if is_sharded(path) else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                refuse_pointer(file, stream.read(len(LFS)))
    if is_sharded(path):
        return read_shards(path)
    if path.suffix != ".safetensors":
        return _read_pth(path)
    with named_for_libraries(path) as name:
        return load_file(name)


def _check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """ValueError for tensors that are no weights, and for shapes beyond what the file holds (strides of 0)."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
        if not plain or tensor.is_complex():
            raise ValueError(f"{path}: {name!r} is no plain tensor of real numbers")
    files = sharded_files(path) if is_sharded(path) else [path]
    described, size = sum(tensor.nbytes for tensor in tensors.values()), sum(file.stat().st_size for file in files)
    if described > SHARED * size:
        raise ValueError(f"{path} describes tensors of {described:,} bytes, but has only {size:,}")


def _read_pth(path: Path) -> object:
    zipped = check_archive(path)
    size = f"{path.stat().st_size:,} bytes"
    try:
        with warnings.catch_warnings(), named_for_libraries(path) as name:
            warnings.simplefilter("ignore")  # what is wrong is said below
            # only the zip format (torch >= 1.6) can be mapped
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)|(?:global|class) `?([\w.]+)", str(error))
        name = next((group for group in foreign.groups() if group), "") if foreign else ""
        if name:
            raise ValueError(f"{path} holds a Python object ({name}), not only tensors: it was not opened") from error
        raise ValueError(f"{path} is not a checkpoint, or holds other objects than tensors ({size})") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch.load raises for bytes that are no checkpoint depends on where it stumbles
        raise ValueError(f"{path} is damaged or not a checkpoint ({size})") from error


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough for a sentence of ours."""
    text = str(error).strip().splitlines()
    return text[0][:160].rstrip(" .:") if text else type(error).__name__


def key_diff(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: frozenset[str] = frozenset()
) -> str:
    """What differs between the names and shapes of two dicts, grouped and counted; "" when nothing does.

    Names of `optional` may be missing, and may be there without being expected.
    """
    # a lora_M (1, in) is not the (out,) of another kind, but small vectors are (C,) in some files, (1, 1, C) in others
    exact = {part for facts in tables.ADAPTERS.values() for part in facts.tensors}
    wrong = []
    for name in expected:
        if name not in tensors:
            continue
        shape, other = tensors[name].shape, expected[name].shape
        fits = [n for n in shape if n != 1] == [n for n in other if n != 1]
        if shape != other and (name.split(".")[-1] in exact or not fits):
            wrong.append(f"{name} {tuple(shape)} instead of {tuple(other)}")
    groups = {
        "missing": [name for name in expected if name not in tensors and name not in optional],
        "unexpected": [name for name in tensors if name not in expected and name not in optional],
        "of the wrong shape": wrong,
    }
    sentences = []
    for group, names in groups.items():
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            sentences.append(f"{len(names)} {group}: {', '.join(names[:NAMES_SHOWN])}{more}")
    return "; ".join(sentences)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the format of the file that holds them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` file, shards and their index, or with torch.save a file of any other name, all or nothing.

    Raises ValueError when it cannot be written; an older file at `path` then stays as it was.
    """
    path = Path(path)
    alone = {name: _alone(tensor) for name, tensor in tensors.items()}
    try:
        if path.name.endswith(SHARDS_INDEX):
            write_sharded(alone, path)
            return
        with atomic_write(path) as file:
            if path.suffix == ".safetensors":
                save_file(_apart(alone), file.name)
            else:
                torch.save(alone, file)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ValueError(f"{path} cannot be written: {reason}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of which those that share memory (a head that is the embedding) have copies: the format knows no
    sharing."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return apart


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` with a storage of its own: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
