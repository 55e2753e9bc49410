"""Checkpoint files: reading them safely, building a model from one strictly, writing them atomically.

A checkpoint is a flat dict of tensors, `.pth` (torch.save) or `.safetensors`. Only tensors are ever read from one.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rwkv_rlhf.files import atomic_write, check_archive
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.placing import (
    Layout,
    Report,
    frozen_layout,
    matrices,
    on_meta,
    place,
    plan_layout,
    replace,
    report_of,
    storage_spec_for,
)
from rwkv_rlhf.model.sizes import STATES, Sizes, check_flags, sizes_of, states_in

if TYPE_CHECKING:
    from rwkv_rlhf.model.rwkv import RWKV
    from rwkv_rlhf.plan import Plan

log = logging.getLogger(__name__)

# Block 0 makes the values that later blocks mix in; some files carry its unused factors all the same.
OPTIONAL = frozenset(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))
WRAPPER = "_forward_module."  # DeepSpeed's prefix in checkpoints of older trainers
NAMES_SHOWN = 4
SHARED = 8  # times that the bytes of a file may be used, by tensors that share them


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file by name, mapped from the disk and not read yet where possible.

    Nothing in the file is executed. Raises ValueError in one sentence for a file that is missing, cut off, damaged,
    holds other objects than tensors, or is not a dict.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a checkpoint file (.pth or .safetensors)")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {_first_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(found, dict) or not found:
        what = "an empty dict" if found == {} else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {what}, expected a dict of named tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} is not a dict of named tensors: entry {name!r} is a {type(value).__name__}")
    _check_plain(found, path)
    return {name.removeprefix(WRAPPER): value.detach() for name, value in found.items()}


def _check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """ValueError for tensors that are no weights, and for shapes beyond what the file holds (strides of 0)."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
        if not plain or tensor.is_complex():
            raise ValueError(f"{path}: {name!r} is no plain tensor of real numbers")
    named, held = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if named > SHARED * held:
        raise ValueError(f"{path} describes tensors of {named:,} bytes, but has only {held:,}")


def _read_pth(path: Path) -> Any:
    zipped = check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            # only the zip format (torch >= 1.6) can be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)|(?:global|class) `?([\w.]+)", str(error))
        name = next((group for group in foreign.groups() if group), "") if foreign else ""
        if name:
            raise ValueError(f"{path} holds a Python object ({name}), not only tensors: it was not opened") from error
        raise ValueError(f"{path} is not a checkpoint, or holds other objects than tensors ({_size(path)})") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch.load raises for bytes that are no checkpoint depends on where it stumbles
        raise ValueError(f"{path} is damaged or not a checkpoint ({_size(path)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160].rstrip(" .:") if text else type(error).__name__


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def file_sizes(path: str | Path) -> Sizes:
    """Sizes of the model in a checkpoint. Raises ValueError, with the file's name, as `read_tensors` and `sizes_of`."""
    return _sizes(read_tensors(path), path)


def _sizes(tensors: Mapping[str, Tensor], source: str | Path) -> Sizes:
    try:
        return sizes_of(tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def fits(shape: Iterable[int], wanted: Iterable[int]) -> bool:
    """Whether two shapes are equal but for dimensions of 1: files have small vectors as (C,) or (1, 1, C)."""
    shape, wanted = tuple(shape), tuple(wanted)
    return shape == wanted or [n for n in shape if n != 1] == [n for n in wanted if n != 1]


# small vectors of the model come in several shapes, but an adapter's lora_M (1, in) is not the (out,) of another kind
EXACT = frozenset(part for adapter in ADAPTERS.values() for part in adapter.linear.tensors)


def key_diff(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], optional: frozenset[str] = frozenset()
) -> str:
    """What differs between the names and shapes of two dicts, grouped and counted; "" when nothing does."""
    missing = [name for name in wanted if name not in tensors and name not in optional]
    unexpected = [name for name in tensors if name not in wanted and name not in optional]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors
        and not (
            tensors[name].shape == wanted[name].shape
            if name.split(".")[-1] in EXACT
            else fits(tensors[name].shape, wanted[name].shape)
        )
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    return "; ".join(f"{len(names)} {group}: {_some(names)}" for group, names in groups.items() if names)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def plain_model(sizes: Sizes, *, compute_dtype: torch.dtype, **options: Any) -> RWKV:
    """An RWKV on the meta device, without adapters. `options` go to its constructor."""
    from rwkv_rlhf.model import VERSIONS
    from rwkv_rlhf.model.rwkv import RWKV

    if sizes.version not in VERSIONS:
        raise ValueError(f"RWKV version {sizes.version} is not built yet; there is {', '.join(VERSIONS)}")
    with torch.device("meta"):
        return RWKV(sizes, compute_dtype=compute_dtype, **options)


def build_model(
    tensors: Mapping[str, Tensor],
    *,
    compute_dtype: torch.dtype,
    plan: Plan | None = None,
    layout: Layout | None = None,
    quant: str = "none",
    limited: bool = False,
    rslora: bool = False,
    svd_niter: int = 4,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    share: bool = False,
    source: str | Path = "the model",
    reopen: Callable[[], Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> tuple[RWKV, Report]:
    """A model from base tensors: adapters and storage by `plan` (or a ready `layout`), else all frozen.

    Trained tensors become float32 masters, frozen ones the compute dtype or packed, one after the other. With `share`
    frozen matrices are used as they lie in `tensors`, in their own dtype, and cast when they are applied. `reopen`, if
    given, yields the tensors anew for each block, so that pages of the file that were read can be let go; `tensors` may
    then be on the meta device. With the `device` meta the model stays there: sizes without numbers. PiSSA begins from
    the factors in `initial` or else from `svd_niter` iterations. `options` go to RWKV's constructor. Raises ValueError
    with the key diff unless names and shapes are exactly those of the model.
    """
    sizes = _sizes(tensors, source)
    learnt = states_in(layout.trained) if layout is not None else plan.states if plan is not None else ()
    sizes = dataclasses.replace(sizes, states=tuple(s for s in STATES if s in (*sizes.states, *learnt)))
    model = plain_model(sizes, compute_dtype=compute_dtype, **options)
    wanted = dict(model.named_parameters())
    states = {name for name in wanted if name.endswith(STATES)}  # one that the file lacks begins at zero
    difference = key_diff(tensors, wanted, (OPTIONAL - wanted.keys()) | states)
    if difference:
        raise ValueError(f"{source} is not an {sizes.version} model of {sizes.n_layer} layers: {difference}")
    if layout is None and plan is None:
        layout = frozen_layout(model, quant)
    elif layout is None:
        layout = plan_layout(model, plan, quant=quant, limited=limited, rslora=rslora)
    shapes = {name: parameter.shape for name, parameter in wanted.items()}
    replace(model, layout)
    spec = storage_spec_for(compute_dtype, device, share, svd_niter)
    if torch.device(device).type == "meta":
        on_meta(model, layout, spec)
        return model, report_of(model, layout)
    dtypes, block = {}, ""
    for name, shape in shapes.items():
        if reopen is not None and _block(name) != block:
            block, tensors = _block(name), {}
            tensors = reopen()
        tensor = tensors[name] if name in tensors or name not in states else torch.zeros(shape)
        dtypes[name] = tensor.dtype
        place(model, name, tensor.reshape(shape), layout, spec, seed, initial)
    report = report_of(model, layout)
    report.dtypes = dtypes
    return model, report


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2])


def load_model(
    path: str | Path, *, compute_dtype: torch.dtype, typed: Mapping[str, Any] | None = None, **build: Any
) -> tuple[RWKV, Report]:
    """The model in a checkpoint, and the report of its making.

    `typed` holds sizes that the user gave (fields of `Sizes`): each must agree with the file. `build` goes to
    `build_model`. Peak memory is the finished model and one block of the file. Raises ValueError in one sentence.
    """
    tensors = {name: tensor.to("meta") for name, tensor in read_tensors(path).items()}
    check_flags(_sizes(tensors, path), **(typed or {}))
    return build_model(tensors, compute_dtype=compute_dtype, source=path, reopen=lambda: read_tensors(path), **build)


def as_trained(path: str, quant: str) -> Layout:
    """Small tensors in float32 and matrices packed as `quant`, as training holds them when adapters learn.

    Scores in the same precision are then those of the first training step.
    """
    tensors = read_tensors(path)
    matrices = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2}
    packed = {name.removesuffix(".weight") for name in matrices - {"emb.weight"}} if quant != "none" else set()
    return Layout(trained=frozenset(tensors.keys() - matrices), packed=frozenset(packed), store=quant)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint of training holds, by name: all that trains, and what RejectParts holds of an adapter.

    The factors that do not learn began at random: without them nothing can be merged.
    """
    adapters = {f"{name}.{part}" for name, layer in matrices(model) if layer.adaptation for part in layer.tensors}
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name in adapters}


def copy_into(
    model: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter], path: str | Path
) -> None:
    """Copy `tensors` into the parameters `wanted` of `model`. Raises ValueError with the key diff unless all match."""
    difference = key_diff(tensors, wanted, OPTIONAL - wanted.keys())
    if difference:
        raise ValueError(f"{path} is not an adapter of this model and plan: {difference}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name].reshape(parameter.shape))


def adopt_forms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let each adapter of `model` take the form that its tensors in a checkpoint have (`Linear.adopt_form`)."""
    for name, layer in matrices(model):
        found = {part: tensors[f"{name}.{part}"] for part in layer.tensors if f"{name}.{part}" in tensors}
        if found:
            layer.adopt_form(found)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Go on from a checkpoint of training: its tensors replace exactly those that train in `model`.

    Raises ValueError with the key diff when the file has others, or of other shapes (another plan, other layers).
    """
    tensors = read_tensors(path)
    adopt_forms(model, tensors)
    copy_into(model, tensors, checkpoint_tensors(model), path)
    log.info("continued from %s", path)


def write_atomic(obj: Any, path: str | Path) -> None:
    """Write tensors (`.safetensors`, or torch.save for any other suffix), or text or bytes, all or nothing.

    Raises ValueError when it cannot be written; an older file at `path` then stays as it was.
    """
    path = Path(path)
    if isinstance(obj, Mapping):
        obj = {name: _alone(value) if isinstance(value, Tensor) else value for name, value in obj.items()}
    try:
        with atomic_write(path) as file:
            if isinstance(obj, str | bytes):
                file.write(obj.encode() if isinstance(obj, str) else obj)
            elif path.suffix == ".safetensors":
                save_file(obj, file.name)
            else:
                torch.save(obj, file)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise ValueError(f"{path} cannot be written: {reason}") from error


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` with a storage of its own: torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
