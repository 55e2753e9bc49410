"""A base model and a checkpoint of training: running them together, and making one model of them.

Legend: V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import NO_FLAGS, AdapterFile, AdapterFlags, check_base, cold_of, open_adapter
from rwkv_rlhf.checkpoints.loading import (
    OPTIONAL,
    BuildOptions,
    adopt_forms,
    build_model,
    checkpoint_tensors,
    copy_into,
    heads_of,
    plain_model,
    tensors_of,
)
from rwkv_rlhf.checkpoints.merge_shares import MergeShares
from rwkv_rlhf.checkpoints.tensor_files import key_diff, read_tensors
from rwkv_rlhf.layers.adaptation import RankError
from rwkv_rlhf.layers.linear import StorageSpec
from rwkv_rlhf.layers.placing import Layout, Report, layer_factors, matrices, wrapped
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.plan import is_new
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.counted import counted

log = logging.getLogger(__name__)

PROBE = "The merged model must answer as the base model with its adapter does: 1 2 3, a b c."
# largest difference of logits that rounding explains, relative to their range, by the dtype of the base file
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2}
COARSE = 5e-2


def _check_names(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], layout: Layout, source: str | Path) -> None:
    """The checkpoint's own tensors and adapted matrices must all exist in the base; raises ValueError."""
    own = {name: adapter[name] for name in sorted(layout.trained) if not is_new(name)}
    lost = [name for name in layout.adapted if f"{name}.weight" not in base and not is_new(f"{name}.weight")]
    difference = key_diff(own, {name: base[name] for name in own if name in base}, OPTIONAL)
    if lost:
        without = f"{counted(len(lost), 'adapter')} without a matrix: {', '.join(sorted(lost)[:4])}"
        difference = f"{without}; {difference}".rstrip("; ")
    if difference:
        raise ValueError(f"{source} was not trained on this base model: {difference}")


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Names the checkpoint whose sidecar asks for a rank that its base's matrices do not have."""
    try:
        yield
    except RankError as mistake:
        raise ValueError(f"{source}: {mistake}") from mistake


def combined_model(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    options: BuildOptions,
    *,
    source: str | Path = "the adapter",
    base_source: str | Path = "the base model",
    reopen: Callable[[], Mapping[str, Tensor]] | None = None,
) -> tuple[RWKV, Report]:
    """Base and checkpoint as they ran in training, by `options.layout`. Raises ValueError, with key diffs.

    What trained still asks for a gradient. `source` and `base_source` name the two in messages; `reopen` is
    that of `build_model`.
    """
    assert options.layout is not None
    _check_names(base, adapter, options.layout, source)
    with _naming(source):
        model, report = build_model(base, options, source=base_source, reopen=reopen)
    adopt_forms(model, adapter)
    copy_into(checkpoint_tensors(model), adapter, source)
    return model, report


def load_combined(
    base: str | Path,
    checkpoint: str | Path,
    options: BuildOptions,
    flags: AdapterFlags = NO_FLAGS,
    *,
    initial_file: str = "",
    cold: str = "",
    force: bool = False,
) -> tuple[RWKV, Report]:
    """The model of two files, for chat and evaluation; the sidecar tells adapters, scaling and storage.

    Nothing of it needs a gradient. Raises ValueError as `check_base`, `open_adapter`, `cold_of`.
    """
    file = open_adapter(checkpoint, flags, initial_file=initial_file, force=force)
    check_base(file.sidecar, base, force=force)
    read = base_reader(base, cold_of(checkpoint, file.sidecar, cold, force=force), force=force)
    options = replace(options, layout=file.layout, initial=file.initial or None)
    model, report = combined_model(
        shapes(read()), file.tensors, options, source=checkpoint, base_source=base, reopen=read
    )
    return model.requires_grad_(False).eval(), report


def base_reader(
    base: str | Path,
    cold: str | Path | None,
    device: torch.device | str = "cpu",
    initial_file: str = "",
    *,
    force: bool = False,
) -> Callable[[], Mapping[str, Tensor]]:
    """A function that opens the base again, with the adapter `cold` merged into each matrix when that is read.

    Raises ValueError when the two do not fit. initial_file: PiSSA's factors of `cold`, if they are not beside it.
    force: also when `cold` was trained on another base.
    """
    if cold is None:
        return lambda: read_tensors(base)
    try:
        file = open_adapter(cold, initial_file=initial_file, force=force)
    except ValueError as mistake:
        raise ValueError(f"cold adapter: {mistake}; merge.py, which has flags for it, can merge it first") from mistake
    check_base(file.sidecar, base, force=force)
    below = base_reader(base, cold_of(cold, file.sidecar, force=force), device, force=force)

    def read() -> Merged:
        return Merged(below(), replace(file, tensors=read_tensors(file.path)), device=device)

    read()  # refuses what does not fit now, not in the middle of the loading
    log.info("cold adapter: %s is merged into %s", cold, base)
    return read


class Merged(Mapping[str, Tensor]):
    """The tensors of one model made of `base` and the checkpoint `file`, each computed when it is asked for.

    Names, shapes and dtypes are those of `base`; a learnt state or a score head may be new (PPO's value head is left
    out). Each matrix is what `merged()` of its layer says: one that was packed in training is packed and unpacked
    first, so that the result is what was trained. Sums are float32 and rounded once. A tensor of a layer with the share
    c is base + c (merged - base), whatever it is: a low-rank update, a whole matrix, a LayerNorm or a state. Raises
    ValueError when the two do not fit.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        file: AdapterFile,
        *,
        device: torch.device | str = "cpu",
        shares: MergeShares | None = None,
    ) -> None:
        self.base, self.file, self.device = base, file, device
        self.shares = shares or MergeShares()
        known = shapes(base)
        _check_names(known, file.tensors, file.layout, file.path)
        sizes = sizes_of(known)
        sizes = replace(
            sizes, heads=(*sizes.heads, *(head for head in heads_of(file.layout) if head not in sizes.heads))
        )
        self.plain = dict(matrices(plain_model(sizes, BuildOptions(torch.float32))))
        changed = {*file.layout.trained, *(f"{name}.weight" for name in file.layout.adapted)}
        new = [name for name in changed if name not in base and self.shares.of(name) and stays(name)]
        self.names = [*base, *sorted(new)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self.names

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor on the meta device; nothing is computed."""
        known = shapes(self.base)
        return {name: known[name] if name in known else self._before(name).to("meta") for name in self.names}

    def _before(self, name: str) -> Tensor:
        """A tensor before training: the base's, or zeros where that lacks it (a learnt state, a scalar head)."""
        if name in self.base:
            return self.base[name]
        trained = self.file.tensors.get(name)  # none: an adapter of it
        return (
            torch.zeros(self.plain[name.removesuffix(".weight")].shape)
            if trained is None
            else torch.zeros_like(trained)
        )

    def __getitem__(self, name: str) -> Tensor:
        layout, share = self.file.layout, self.shares.of(name)
        layer = name.removesuffix(".weight")
        touched = name in layout.trained or layer in layout.adapted or layer in layout.packed
        if not (touched and share):
            return self.base[name]
        before = self._before(name)
        if name in layout.trained:
            after = self.file.tensors[name].reshape(before.shape)
            if share == 1:
                return after.to(before.dtype)
        else:
            after = self._matrix(layer, before)
        if share != 1:
            after = torch.lerp(before.to(after.device).float(), after.float(), share)
        return after.to(device="cpu", dtype=before.dtype)

    def _matrix(self, name: str, weight: Tensor) -> Tensor:
        layout, plain = self.file.layout, self.plain[name]
        spec = StorageSpec(torch.float32, self.device, store=layout.store if name in layout.packed else "none")
        if name not in layout.adapted:
            plain.load_weight(weight, spec)
            merged = plain.merged()
            plain.store, plain.weight = None, None  # only a list of layers here: keep one matrix at a time
            return merged
        with _naming(self.file.path):
            layer = wrapped(plain, name, layout.adapted[name])
        layer.load_weight(weight, replace(spec, initial=layer_factors(layer, name, self.file.initial)))
        tensors = tensors_of(name, layer, self.file.tensors)
        layer.adopt_form(tensors)
        parameters = {f"{name}.{part}": getattr(layer, part) for part in layer.tensors}
        copy_into(parameters, {f"{name}.{part}": tensor for part, tensor in tensors.items()}, self.file.path)
        return layer.merged()


def over_dense(file: AdapterFile) -> AdapterFile:
    """The checkpoint as if its base had not been packed in training: nothing but what it learnt moves a matrix."""
    return replace(file, layout=replace(file.layout, packed=frozenset(), store=tables.DENSE))


class Moved(NamedTuple):
    """What packing alone did to matrices without an adapter: how many there are, and RMS(change) / RMS(matrix) of all
    of them and of the one that moved most."""

    matrices: int
    mean: float
    largest: float
    name: str


def moved_by_packing(base: Mapping[str, Tensor], layout: Layout, merged: Mapping[str, Tensor]) -> Moved:
    """How far matrices that nothing trained are from those of `base` in the `merged` model."""
    squares: dict[str, tuple[float, float]] = {}
    for name in sorted(f"{layer}.weight" for layer in layout.packed - layout.adapted.keys()):
        before = base[name].float()
        change = merged[name].float() - before
        squares[name] = float(change.square().sum()), float(before.square().sum())
    ratios = {name: math.sqrt(change / max(before, 1e-30)) for name, (change, before) in squares.items()}
    name = max(ratios, key=lambda name: ratios[name], default="")
    whole = sum(before for _, before in squares.values())
    mean = math.sqrt(sum(change for change, _ in squares.values()) / max(whole, 1e-30))
    return Moved(len(squares), mean, ratios.get(name, 0.0), name)


def stays(name: str) -> bool:
    """Whether the tensor `name` of a checkpoint belongs to the merged model: not a head that only training needs."""
    head = name.split(".")[0]
    return head not in tables.SCALAR_HEADS or tables.SCALAR_HEADS[head].merged


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of tensors that may be computed when they are read, on the meta device."""
    return tensors.shapes() if isinstance(tensors, Merged) else {n: tensor.to("meta") for n, tensor in tensors.items()}


@torch.no_grad()
def probe_logits(model: RWKV) -> Tensor:
    """Logits (T, V) float32 after each byte of a fixed text (World's tokens 1 to 256 are the single bytes)."""
    tokens = torch.tensor([[(byte + 1) % model.sizes.vocab_size for byte in PROBE.encode()]])
    hidden, _ = model.eval()(tokens)
    logits: Tensor = model.head(hidden)
    return logits[0].float()


class Difference(NamedTuple):
    """The largest difference of two models' logits, relative to their range, and what rounding allows."""

    found: float
    allowed: float


def check_merged(
    base: Mapping[str, Tensor],
    file: AdapterFile,
    merged: Mapping[str, Tensor],
    shares: MergeShares | None = None,
) -> Difference:
    """Compare logits of base + adapter with those of the merged model on a probe text.

    Both run in float32. With shares other than 0 and 1 there is nothing that was trained to compare with: then (0, inf)
    or, when the merged model's logits are no numbers, (inf, 0).
    """
    merge_shares = shares or MergeShares()
    options = BuildOptions(torch.float32, share=True)
    after = probe_logits(build_model(merged, options)[0])
    if not merge_shares.whole:
        finite = bool(after.isfinite().all())
        return Difference(0.0, math.inf) if finite else Difference(math.inf, 0.0)
    layout, tensors = merge_shares.of_layout(file.layout), merge_shares.of_tensors(file.tensors)
    options = replace(options, layout=layout, initial=file.initial or None)
    before = probe_logits(combined_model(base, tensors, options)[0])
    difference = (before - after).abs().max() / (before.max() - before.min()).clamp(min=1e-12)
    matrix = {f"{name}.weight" for name in layout.adapted.keys() | layout.packed}
    changed = {base[name].dtype for name in matrix if name in base}
    changed |= {merged[name].dtype for name in layout.trained if name in merged}
    return Difference(float(difference), max((TOLERANCE.get(dtype, COARSE) for dtype in changed), default=1e-5))
