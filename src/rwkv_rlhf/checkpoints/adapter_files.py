"""A checkpoint of training as files: its tensors, its sidecar, PiSSA's initial factors, and what they say together."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_rlhf.checkpoints.loading import read_tensors, write_atomic
from rwkv_rlhf.checkpoints.sidecar import Sidecar, check_whole, read_sidecar
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.placing import Layout, matrices
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.plan import is_scaled
from rwkv_rlhf.settings import tables

log = logging.getLogger(__name__)

OLD_FACTORS = "init_pissa.pth"  # as older programs call the file of initial factors; their names: init_lora_A
WITHOUT_ADAPTER = ("state", "full")


class Mismatch(ValueError):
    """Base, checkpoint, sidecar and what was said of them do not fit.

    `about` is what could be said otherwise (base, storage, mode, scaling, alpha, factors, cold, or `no scaling` where
    it is missing); each program knows its own flags for that.
    """

    def __init__(self, about: str, sentence: str) -> None:
        super().__init__(sentence)
        self.about = about


@contextmanager
def hinting(hints: Mapping[str, str]) -> Iterator[None]:
    """Inside, a Mismatch about one of the keys of `hints` becomes a ValueError that ends with its hint."""
    try:
        yield
    except Mismatch as mistake:
        if mistake.about not in hints:
            raise
        raise ValueError(f"{mistake}: {hints[mistake.about]}") from mistake


@dataclass(frozen=True)
class AdapterFile:
    """A checkpoint of training, read: `initial` holds PiSSA's first factors by `<layer>.lora_A_init`."""

    path: Path
    tensors: Mapping[str, Tensor]
    sidecar: Sidecar | None
    layout: Layout
    initial: Mapping[str, Tensor]


def open_adapter(
    path: str | Path,
    *,
    mode: str | None = None,
    scaling: float | None = None,
    alpha: float | None = None,
    quant: str | None = None,
    initial_file: str | Path = "",
    force: bool = False,
) -> AdapterFile:
    """The checkpoint `path` with all that explains it. Raises ValueError as `chosen_quant`, `layout_of`, `factors_of`.

    mode, scaling, alpha, quant: what is known where there is no sidecar. initial_file: PiSSA's factors, if they are not
    beside the checkpoint.
    """
    sidecar, tensors = read_sidecar(path), read_tensors(path)
    if not force:
        check_whole(sidecar, path)
    store = chosen_quant(sidecar, quant, force=force)
    try:
        layout = layout_of(tensors, sidecar, mode=mode, scaling=scaling, alpha=alpha, quant=store)
    except Mismatch as mistake:
        raise Mismatch(mistake.about, f"{path}: {mistake}") from mistake
    initial = {}
    if begins_from_matrix({how.mode for how in layout.adapted.values()}):
        initial = factors_of(path, sidecar, initial_file, force=force)
    elif initial_file:
        raise ValueError(f"{path} holds no PiSSA adapter: nothing in it began from {initial_file}")
    return AdapterFile(Path(path), tensors, sidecar, layout, initial)


def check_base(sidecar: Sidecar | None, base: str | Path, *, force: bool = False, sha256: str = "") -> None:
    """Refuse an adapter that was trained on another file than `base` (unless `force`); raises ValueError.

    Hashes the file unless its `sha256` is given.
    """
    if sidecar is None or not sidecar.base_sha256:
        return
    found = sha256 or file_hash(base)
    if found == sidecar.base_sha256:
        return
    sentence = (
        f"the adapter was trained on {sidecar.base_file} (sha256 {sidecar.base_sha256[:12]}), "
        f"{base} is another file (sha256 {found[:12]})"
    )
    if not force:
        raise Mismatch("base", sentence)
    log.warning("%s; going on all the same", sentence)


def cold_of(checkpoint: str | Path, sidecar: Sidecar | None, typed: str = "", *, force: bool = False) -> Path | None:
    """The adapter that lay merged below `checkpoint` in training, None if there was none.

    It is `typed`, or stands where the sidecar says or beside the checkpoint. Raises ValueError when it is not found or
    is another file (unless `force`).
    """
    if sidecar is None or not sidecar.cold_sha256:
        if typed and sidecar is not None and not force:
            raise Mismatch("cold", f"{checkpoint} was trained without a cold adapter, not over {typed}")
        return Path(typed) if typed else None
    recorded = Path(sidecar.cold_file)
    places = (Path(typed),) if typed else (recorded, Path(checkpoint).parent / recorded.name)
    there = [place for place in places if place.is_file()]
    found = next((place for place in there if file_hash(place) == sidecar.cold_sha256), None)
    if found is None and there and force:
        return there[0]
    if found is None:
        why = f"{typed} is another file" if typed and there else "which is not there"
        raise Mismatch("cold", f"{checkpoint} was trained over the cold adapter {recorded}, {why}")
    return found


def chosen_quant(sidecar: Sidecar | None, typed: str | None, *, force: bool = False) -> str:
    """The storage that the frozen matrices had in training: the sidecar's, or what was typed when there is none.

    Raises ValueError when the two differ (unless `force`: then what was typed) and for an unknown storage.
    """
    if typed is not None:
        store_class(typed)
    if sidecar is None:
        return typed or "none"
    if typed is not None and typed != sidecar.quant_mode and not force:
        trained = f"the adapter was trained on {sidecar.quant_mode} matrices"
        raise Mismatch("storage", f"storage {typed} contradicts the sidecar: {trained}")
    return typed or sidecar.quant_mode


def layout_of(
    adapter: Mapping[str, Tensor],
    sidecar: Sidecar | None,
    *,
    mode: str | None = None,
    scaling: float | None = None,
    alpha: float | None = None,
    quant: str = "none",
) -> Layout:
    """What was trained and how, from a checkpoint's tensors and its sidecar, or from flags where there is none.

    Without a sidecar the tensors' names tell the mode of each layer, `mode` tells pissa from lora, one of `scaling` (or
    `alpha`, divided by each rank) is needed when a mode has one, and with `quant` the adapted matrices count as packed.
    Raises ValueError naming both values where flags and sidecar disagree.
    """
    if sidecar is not None:
        _contradictions(sidecar, mode, scaling, alpha)
        adapted: Mapping[str, Adaptation] = sidecar.adapted
        packed = frozenset(sidecar.packed) or _packable(adapted)
    else:
        adapted = _guessed(adapter, mode, scaling, alpha)
        packed = _packable(adapted)
    own = {f"{name}.{part}" for name, how in adapted.items() for part in parts_of(how.mode)}
    trained = frozenset(adapter.keys() - own)
    return Layout(adapted, packed if quant != "none" else frozenset(), trained, quant)


def _packable(adapted: Mapping[str, Adaptation]) -> frozenset[str]:
    return frozenset(name for name in adapted if name != "emb")


def parts_of(mode: str) -> tuple[str, ...]:
    """Names of an adapter's tensors. Raises ValueError for a mode that there is not."""
    if mode not in ADAPTERS:
        raise ValueError(f"mode {mode}: the adapters of this program are {', '.join(ADAPTERS)}")
    return ADAPTERS[mode].linear.tensors


def _contradictions(sidecar: Sidecar, mode: str | None, scaling: float | None, alpha: float | None) -> None:
    said: dict[str, str | float | None] = {"mode": mode, "scaling": scaling, "alpha": alpha}
    for name, typed in said.items():
        scaled = (how for how in sidecar.adapted.values() if name == "mode" or is_scaled(how.mode))
        known = sorted({getattr(how, name) for how in scaled})
        if typed is not None and known and not all(_same(typed, value) for value in known):
            found = ", ".join(map(str, known))
            raise Mismatch(name, f"{name} {typed} contradicts the sidecar, which has {name} {found}")


def _same(typed: str | float, known: str | float) -> bool:
    return typed == known if isinstance(typed, str) else math.isclose(typed, known, rel_tol=1e-4)


def _guessed(
    adapter: Mapping[str, Tensor], mode: str | None, scaling: float | None, alpha: float | None
) -> dict[str, Adaptation]:
    if mode is not None and mode not in WITHOUT_ADAPTER:
        parts_of(mode)
    found: dict[str, str] = {}
    signs = {facts.sign: kind for kind, facts in tables.ADAPTERS.items() if facts.sign}
    for part in sorted(
        signs, key=lambda sign: -len(tables.ADAPTERS[signs[sign]].tensors)
    ):  # DoRA's tensors before LoRA's
        for name in adapter:
            layer, _, last = name.rpartition(".")
            if last == part:
                found.setdefault(layer, _unsigned(mode, signs[part]) or signs[part])
    kinds = sorted(set(found.values()))
    fits = mode in (None, "lora", *kinds) or (mode in WITHOUT_ADAPTER and not kinds)
    if not fits:
        raise Mismatch("mode", f"mode {mode}, but the tensors are those of {', '.join(kinds) or 'no adapter'}")
    if any(map(is_scaled, kinds)) and scaling is None and alpha is None:
        raise Mismatch("no scaling", "the adapter has no sidecar (.json beside it), so its scaling must be given")
    if scaling is not None and alpha is not None:
        raise ValueError(f"scaling {scaling} and alpha {alpha} say the same thing: give one of them")
    adapted = {}
    for layer, kind in found.items():
        rank = ADAPTERS[kind].linear.rank_of(adapter[f"{layer}.{parts_of(kind)[0]}"])
        adapted[layer] = Adaptation.make(kind, rank, alpha or 0.0)
        if is_scaled(kind) and scaling is not None:
            adapted[layer] = Adaptation(kind, rank, scaling * rank, scaling)
    return adapted


def _unsigned(mode: str | None, found: str) -> str | None:
    """`mode` where it has no sign of its own and the tensors of `found` (PiSSA has LoRA's)."""
    facts = tables.ADAPTERS.get(mode or "")
    same = facts is not None and not facts.sign and facts.tensors == tables.ADAPTERS[found].tensors
    return mode if same else None


def begins_from_matrix(modes: set[str] | frozenset[str]) -> bool:
    """Whether one of `modes` has initial factors without which its adapter means nothing."""
    return any(ADAPTERS[mode].linear.initial for mode in modes if mode in ADAPTERS)


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters of `model` began with and cannot be merged without, by name, on the CPU."""
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu()
        for name, layer in matrices(model)
        for part in layer.initial
    }


def write_factors(model: nn.Module, folder: Path, suffix: str) -> tuple[str, str]:
    """Write the initial factors of `model` into `folder`, once: (name of the file, hash), or ("", "") without any.

    The name holds the hash, so that runs in one folder do not overwrite each other's factors.
    """
    factors = initial_factors(model)
    if not factors:
        return "", ""
    sha256 = tensors_hash(factors)
    path = folder / f"pissa-init-{sha256[:12]}{suffix}"
    if not path.exists():
        write_atomic(factors, path)
    return path.name, sha256


def factors_path(checkpoint: str | Path, sidecar: Sidecar | None, typed: str | Path = "") -> Path:
    """Where a checkpoint's initial factors are to be found, if it has any: `typed`, or beside the checkpoint."""
    name = sidecar.initial_file if sidecar is not None and sidecar.initial_file else OLD_FACTORS
    return Path(typed) if typed else Path(checkpoint).parent / name


def factors_of(
    checkpoint: str | Path, sidecar: Sidecar | None, typed: str | Path = "", *, force: bool = False
) -> dict[str, Tensor]:
    """The initial factors of a PiSSA checkpoint by `<layer>.lora_A_init`: from `typed`, or beside the checkpoint.

    Files of older programs (`<layer>.init_lora_A`) are read too. Raises ValueError when they are missing or not those
    that the sidecar names (unless `force`).
    """
    path = factors_path(checkpoint, sidecar, typed)
    if not path.exists():
        raise Mismatch("factors", f"{checkpoint} holds PiSSA, and its initial factors are not there: {path}")
    factors = {}
    for key, tensor in read_tensors(path).items():
        layer, _, part = key.rpartition(".")
        factors[f"{layer}.{part.removeprefix('init_')}_init" if part.startswith("init_") else key] = tensor
    if sidecar is not None and sidecar.initial_sha256 and tensors_hash(factors) != sidecar.initial_sha256 and not force:
        raise Mismatch("factors", f"{path} holds other initial factors than those that {checkpoint} began with")
    return factors


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the format of the file that holds them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
