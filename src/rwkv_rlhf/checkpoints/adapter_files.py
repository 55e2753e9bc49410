"""The files of a checkpoint of training: tensors, sidecar and PiSSA's initial factors, and what follows from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from rwkv_rlhf.checkpoints.sidecar import Sidecar, check_whole, read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, tensors_hash, write_tensors
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
    """Base, checkpoint, sidecar and the user's flags do not fit each other.

    `about` is what the user could change (base, storage, mode, scaling, alpha, factors, cold, or `no scaling` where
    it is missing); each program knows its own flags for that.
    """

    def __init__(self, about: str, sentence: str) -> None:
        super().__init__(sentence)
        self.about = about


@contextmanager
def hinting(hints: Mapping[str, str]) -> Iterator[None]:
    """Turns a Mismatch inside the block into a ValueError that ends with the hint of what it is about."""
    try:
        yield
    except Mismatch as mistake:
        if mistake.about not in hints:
            raise
        raise ValueError(f"{mistake}: {hints[mistake.about]}") from mistake


@dataclass(frozen=True)
class AdapterFlags:
    """What the user says of a checkpoint's adapters, None where nothing is said. Needed where there is no sidecar."""

    mode: str | None = None
    scaling: float | None = None
    alpha: float | None = None
    quant: str | None = None


NO_FLAGS = AdapterFlags()


@dataclass(frozen=True)
class AdapterFile:
    """A checkpoint of training, read: `initial` holds PiSSA's first factors by `<layer>.lora_A_init`."""

    path: Path
    tensors: Mapping[str, Tensor]
    sidecar: Sidecar | None
    layout: Layout
    initial: Mapping[str, Tensor]


def open_adapter(
    path: str | Path, flags: AdapterFlags = NO_FLAGS, *, initial_file: str | Path = "", force: bool = False
) -> AdapterFile:
    """The checkpoint `path` with all that explains it. Raises ValueError as `chosen_quant`, `layout_of`, `factors_of`.

    initial_file: PiSSA's factors, if they are not beside the checkpoint.
    """
    sidecar, tensors = read_sidecar(path), read_tensors(path)
    if not force:
        check_whole(sidecar, path)
    store = chosen_quant(sidecar, flags.quant, force=force)
    try:
        layout = layout_of(tensors, sidecar, replace(flags, quant=store))
    except Mismatch as mistake:
        raise Mismatch(mistake.about, f"{path}: {mistake}") from mistake
    initial = {}
    if needs_initial_factors(layout.modes):
        initial = factors_of(path, sidecar, initial_file, force=force)
    elif initial_file:
        raise ValueError(f"{path} holds no PiSSA adapter, nothing in it began from {initial_file}: leave that out")
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


def cold_of(checkpoint: str | Path, sidecar: Sidecar | None, given: str = "", *, force: bool = False) -> Path | None:
    """The adapter that lay merged below `checkpoint` in training, None if there was none.

    It is the file `given` by the user, or else the one at the sidecar's path or beside the checkpoint. Raises
    ValueError when it is not found or is another file (unless `force`).
    """
    if sidecar is None or not sidecar.cold_sha256:
        if given and sidecar is not None and not force:
            raise Mismatch("cold", f"{checkpoint} was trained without a cold adapter, not over {given}")
        return Path(given) if given else None
    recorded = Path(sidecar.cold_file)
    places = (Path(given),) if given else (recorded, Path(checkpoint).parent / recorded.name)
    there = [place for place in places if place.is_file()]
    for place in there:
        if file_hash(place) == sidecar.cold_sha256:
            return place
    if there and force:
        return there[0]
    why = f"{given} is another file" if given and there else "which is not there"
    raise Mismatch("cold", f"{checkpoint} was trained over the cold adapter {recorded}, {why}")


def chosen_quant(sidecar: Sidecar | None, given: str | None, *, force: bool = False) -> str:
    """The storage that the frozen matrices had in training: the sidecar's, or the one `given` when there is none.

    Raises ValueError when the two differ (unless `force`: then it is the one given) and for an unknown storage.
    """
    if given is not None:
        store_class(given)
    if sidecar is None:
        return given or "none"
    if given is not None and given != sidecar.quant_mode and not force:
        trained = f"the adapter was trained on {sidecar.quant_mode} matrices"
        raise Mismatch("storage", f"storage {given} contradicts the sidecar: {trained}")
    return given or sidecar.quant_mode


def layout_of(adapter: Mapping[str, Tensor], sidecar: Sidecar | None, flags: AdapterFlags = NO_FLAGS) -> Layout:
    """What was trained and how, from a checkpoint's tensors and its sidecar, or from flags where there is none.

    Without a sidecar the tensors' names tell the mode of each layer, `flags.mode` tells pissa from lora, one of
    `flags.scaling` (or `flags.alpha`, divided by each rank) is needed when a mode has one, and with `flags.quant` the
    adapted matrices count as packed. Raises ValueError naming both values where flags and sidecar disagree.
    """
    if sidecar is not None:
        _check_flags(sidecar, flags)
    adapted = sidecar.adapted if sidecar is not None else _guessed(adapter, flags)
    own = {f"{name}.{part}" for name, how in adapted.items() for part in adapter_tensor_names(how.mode)}
    packed: frozenset[str] = frozenset()
    if flags.quant not in (None, "none"):
        packed = frozenset(sidecar.packed if sidecar is not None else ()) or frozenset(adapted.keys() - {"emb"})
    return Layout(adapted, packed, frozenset(adapter.keys() - own), flags.quant or "none")


def adapter_tensor_names(mode: str) -> tuple[str, ...]:
    """Names of an adapter's tensors. Raises ValueError for a mode that there is not."""
    if mode not in ADAPTERS:
        raise ValueError(f"mode {mode}: the adapters of this program are {', '.join(ADAPTERS)}")
    return ADAPTERS[mode].linear.tensors


def _check_flags(sidecar: Sidecar, flags: AdapterFlags) -> None:
    """Raises Mismatch where a flag contradicts the sidecar."""
    for name in ("mode", "scaling", "alpha"):
        given = getattr(flags, name)
        adapters = [how for how in sidecar.adapted.values() if name == "mode" or is_scaled(how.mode)]
        trained = sorted({getattr(how, name) for how in adapters})
        if given is None:
            continue
        same = all(v == given if name == "mode" else math.isclose(v, given, rel_tol=1e-4) for v in trained)
        if not same:
            found = ", ".join(map(str, trained))
            raise Mismatch(name, f"{name} {given} contradicts the sidecar, which has {name} {found}")


def _guessed(adapter: Mapping[str, Tensor], flags: AdapterFlags) -> dict[str, Adaptation]:
    """How each layer was adapted, from the names of a checkpoint's tensors and what the flags say."""
    mode, scaling, alpha = flags.mode, flags.scaling, flags.alpha
    if mode is not None and mode not in WITHOUT_ADAPTER:
        adapter_tensor_names(mode)
    found: dict[str, str] = {}
    signs = {facts.sign: kind for kind, facts in tables.ADAPTERS.items() if facts.sign}
    # DoRA's tensors before LoRA's, which it has too
    for part in sorted(signs, key=lambda sign: -len(tables.ADAPTERS[signs[sign]].tensors)):
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
        rank = ADAPTERS[kind].linear.rank_of(adapter[f"{layer}.{adapter_tensor_names(kind)[0]}"])
        adapted[layer] = Adaptation.make(kind, rank, alpha or 0.0)
        if is_scaled(kind) and scaling is not None:
            adapted[layer] = Adaptation(kind, rank, scaling * rank, scaling)
    return adapted


def _unsigned(mode: str | None, found: str) -> str | None:
    """`mode` where it has no sign of its own and the tensors of `found` (PiSSA has LoRA's)."""
    facts = tables.ADAPTERS.get(mode or "")
    same = facts is not None and not facts.sign and facts.tensors == tables.ADAPTERS[found].tensors
    return mode if same else None


def needs_initial_factors(modes: Collection[str]) -> bool:
    """Whether an adapter of one of `modes` means nothing without the factors that it began with."""
    return any(ADAPTERS[mode].linear.initial for mode in modes if mode in ADAPTERS)


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """What the adapters of `model` began with and cannot be merged without, by name, on the CPU."""
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu()
        for name, layer in matrices(model)
        for part in layer.initial
    }


class FactorsFile(NamedTuple):
    """The file of a run's initial factors: its name in the project folder and `tensors_hash`; "" without any."""

    name: str = ""
    sha256: str = ""


def write_factors(model: nn.Module, folder: Path, suffix: str) -> FactorsFile:
    """Write the initial factors of `model` into `folder`, once.

    The name holds the hash, so that runs in one folder do not overwrite each other's factors.
    """
    factors = initial_factors(model)
    if not factors:
        return FactorsFile()
    sha256 = tensors_hash(factors)
    path = folder / f"pissa-init-{sha256[:12]}{suffix}"
    if not path.exists():
        write_tensors(factors, path)
    return FactorsFile(path.name, sha256)


def factors_path(checkpoint: str | Path, sidecar: Sidecar | None, given: str | Path = "") -> Path:
    """Where a checkpoint's initial factors are to be found, if it has any: `given`, or beside the checkpoint."""
    name = sidecar.initial_file if sidecar is not None and sidecar.initial_file else OLD_FACTORS
    return Path(given) if given else Path(checkpoint).parent / name


def factors_of(
    checkpoint: str | Path, sidecar: Sidecar | None, given: str | Path = "", *, force: bool = False
) -> dict[str, Tensor]:
    """The initial factors of a PiSSA checkpoint by `<layer>.lora_A_init`: from `given`, or beside the checkpoint.

    Files of older programs (`<layer>.init_lora_A`) are read too. Raises ValueError when they are missing or not those
    that the sidecar names (unless `force`).
    """
    path = factors_path(checkpoint, sidecar, given)
    beside = factors_path(checkpoint, sidecar)
    if not path.exists() and beside.exists():
        raise ValueError(
            f"{given} is not there, and {checkpoint} began from {beside}, which is found by itself: leave it out"
        )
    if not path.exists():
        raise Mismatch("factors", f"{checkpoint} holds PiSSA, and its initial factors are not there: {path}")
    factors = {}
    for key, tensor in read_tensors(path).items():
        layer, _, part = key.rpartition(".")
        factors[f"{layer}.{part.removeprefix('init_')}_init" if part.startswith("init_") else key] = tensor
    if sidecar is not None and sidecar.initial_sha256 and tensors_hash(factors) != sidecar.initial_sha256 and not force:
        raise Mismatch("factors", f"{path} holds other initial factors than those that {checkpoint} began with")
    return factors
