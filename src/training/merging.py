"""A base model and a checkpoint of training: running them together, and making one model of them.

Legend: V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.files import file_hash
from src.layers import ADAPTERS
from src.layers.adaptation import Adaptation
from src.layers.linear import Embedding, Linear, Placement
from src.layers.placing import Layout, Report, adapter_for, matrices
from src.layers.stores import store_class
from src.model.checkpoint import build_model, fill, kept, key_diff, plain_model, read_tensors
from src.model.rwkv import RWKV
from src.model.sizes import sizes_of
from src.plan import is_state
from src.training.sidecar import Sidecar, read_sidecar

log = logging.getLogger(__name__)

PROBE = "The merged model must answer as the base model with its adapter does: 1 2 3, a b c."
# largest difference of logits that rounding explains, relative to their range, by the dtype of the base file
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2}
COARSE = 5e-2


class Mismatch(ValueError):
    """Base, checkpoint, sidecar and what was said of them do not fit.

    `about` is what could be said otherwise (base, storage, mode, scaling, alpha, or `no scaling` where it is missing);
    each program knows its own flags for that.
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

    Without a sidecar the mode is lora unless given, one of `scaling` (or `alpha`, divided by each rank) is needed when
    there are adapters, and with `quant` the adapted matrices count as packed. Raises ValueError naming both values
    where flags and sidecar disagree.
    """
    if sidecar is not None:
        _contradictions(sidecar, mode, scaling, alpha)
        adapted: Mapping[str, Adaptation] = sidecar.adapted
        packed = frozenset(sidecar.packed) or _packable(adapted)
    else:
        adapted = _guessed(adapter, mode or "lora", scaling, alpha)
        packed = _packable(adapted)
    own = {f"{name}.{part}" for name, how in adapted.items() for part in _parts(how.mode)}
    trained = frozenset(adapter.keys() - own)
    return Layout(adapted, packed if quant != "none" else frozenset(), trained, quant)


def _packable(adapted: Mapping[str, Adaptation]) -> frozenset[str]:
    return frozenset(name for name in adapted if name != "emb")


def _parts(mode: str) -> tuple[str, ...]:
    if mode not in ADAPTERS:
        raise ValueError(f"mode {mode}: the adapters of this program are {', '.join(ADAPTERS)}")
    return ADAPTERS[mode].linear.tensors


def _contradictions(sidecar: Sidecar, mode: str | None, scaling: float | None, alpha: float | None) -> None:
    said: dict[str, str | float | None] = {"mode": mode, "scaling": scaling, "alpha": alpha}
    for name, typed in said.items():
        known = sorted({getattr(how, name) for how in sidecar.adapted.values()})
        if typed is not None and known and not all(_same(typed, value) for value in known):
            found = ", ".join(map(str, known))
            raise Mismatch(name, f"{name} {typed} contradicts the sidecar, which has {name} {found}")


def _same(typed: str | float, known: str | float) -> bool:
    return typed == known if isinstance(typed, str) else math.isclose(typed, known, rel_tol=1e-4)


def _guessed(
    adapter: Mapping[str, Tensor], mode: str, scaling: float | None, alpha: float | None
) -> dict[str, Adaptation]:
    first = f".{_parts(mode)[0]}"
    ranks = {name.removesuffix(first): t.shape[0] for name, t in adapter.items() if name.endswith(first)}
    if ranks and scaling is None and alpha is None:
        raise Mismatch("no scaling", "the adapter has no sidecar (.json beside it), so its scaling must be given")
    if scaling is not None and alpha is not None:
        raise ValueError(f"scaling {scaling} and alpha {alpha} say the same thing: give one of them")
    return {
        name: Adaptation(mode, rank, scaling * rank, scaling)
        if scaling is not None
        else Adaptation.make(mode, rank, alpha)
        for name, rank in ranks.items()
    }


def _check_names(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], layout: Layout, source: str | Path) -> None:
    """The checkpoint's own tensors and adapted matrices must all exist in the base; raises ValueError."""
    own = {name: adapter[name] for name in sorted(layout.trained) if not is_state(name)}
    lost = [name for name in layout.adapted if f"{name}.weight" not in base]
    difference = key_diff(own, {name: base[name] for name in own if name in base})
    if lost:
        difference = f"{len(lost)} adapters without a matrix: {', '.join(sorted(lost)[:4])}; {difference}".rstrip("; ")
    if difference:
        raise ValueError(f"{source} was not trained on this base model: {difference}")


def combined_model(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    layout: Layout,
    *,
    compute_dtype: torch.dtype,
    source: str | Path = "the adapter",
    base_source: str | Path = "the base model",
    **build: Any,
) -> tuple[RWKV, Report]:
    """Base and checkpoint as they ran in training. `build` goes to `build_model`. Raises ValueError, with key diffs.

    What trained still asks for a gradient. `source` and `base_source` name the two in messages.
    """
    _check_names(base, adapter, layout, source)
    model, report = build_model(base, compute_dtype=compute_dtype, layout=layout, source=base_source, **build)
    fill(model, adapter, kept(model), source)
    return model, report


def load_combined(
    base: str | Path,
    checkpoint: str | Path,
    *,
    compute_dtype: torch.dtype,
    quant: str | None = None,
    scaling: float | None = None,
    alpha: float | None = None,
    force: bool = False,
    **build: Any,
) -> tuple[RWKV, Report]:
    """The model of two files, for chat and evaluation; the sidecar tells adapters, scaling and storage.

    Nothing of it needs a gradient. Raises ValueError as `check_base`, `chosen_quant`, `layout_of`.
    """
    sidecar = read_sidecar(checkpoint)
    check_base(sidecar, base, force=force)
    quant = chosen_quant(sidecar, quant, force=force)
    adapter = read_tensors(checkpoint)
    layout = layout_of(adapter, sidecar, scaling=scaling, alpha=alpha, quant=quant)
    build |= {"source": checkpoint, "base_source": base, "reopen": lambda: read_tensors(base)}
    model, report = combined_model(read_tensors(base), adapter, layout, compute_dtype=compute_dtype, **build)
    return model.requires_grad_(False).eval(), report


def merged_tensors(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    layout: Layout,
    *,
    source: str | Path = "the adapter",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """One model: names, shapes and dtypes as `base`. Each matrix is what `merged()` of its layer says.

    A matrix that was packed in training is packed and unpacked first, so that the result is what was trained. Sums are
    float32 and rounded once. Raises ValueError when the adapter does not belong to the base.
    """
    _check_names(base, adapter, layout, source)
    result = dict(base)
    for name in layout.trained:
        like = base.get(name, adapter[name])  # a learnt state may be new: it stays as it is
        result[name] = adapter[name].to(like.dtype).reshape(like.shape)
    for name, plain in matrices(plain_model(sizes_of(base), compute_dtype=torch.float32)):
        if name in layout.adapted or name in layout.packed:
            weight = base[f"{name}.weight"]
            merged = _merged_matrix(name, plain, weight, adapter, layout, source, device)
            result[f"{name}.weight"] = merged.to(device="cpu", dtype=weight.dtype)
    return result


def _merged_matrix(
    name: str,
    plain: Linear | Embedding,
    weight: Tensor,
    adapter: Mapping[str, Tensor],
    layout: Layout,
    source: str | Path,
    device: torch.device | str,
) -> Tensor:
    layer = adapter_for(name, plain, layout) or plain
    store = layout.store if name in layout.packed else "none"
    layer.take(weight, Placement(torch.float32, device, store))
    parts = _parts(layer.adaptation.mode) if layer.adaptation else ()
    wanted = {f"{name}.{part}": getattr(layer, part) for part in parts}
    fill(layer, {key: adapter[key] for key in wanted if key in adapter}, wanted, source)
    merged = layer.merged()
    layer.store, layer.weight = None, None  # the plain model is only a list of layers here: keep one matrix at a time
    return merged


@torch.no_grad()
def probe_logits(model: nn.Module, vocab_size: int) -> Tensor:
    """Logits (T, V) float32 after each byte of a fixed text (World's tokens 1 to 256 are the single bytes)."""
    tokens = torch.tensor([[(byte + 1) % vocab_size for byte in PROBE.encode()]])
    hidden, _ = model.eval()(tokens)
    return model.head(hidden)[0].float()


def check_merged(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], layout: Layout, merged: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Compare logits of base + adapter with those of the merged model on a probe text.

    Both run in float32. Returns (largest difference relative to the range of the logits, what rounding allows).
    """
    vocab_size = sizes_of(base).vocab_size
    model, _ = combined_model(base, adapter, layout, compute_dtype=torch.float32, share=True)
    before = probe_logits(model, vocab_size)
    del model
    model, _ = build_model(merged, compute_dtype=torch.float32, share=True)
    after = probe_logits(model, vocab_size)
    difference = (before - after).abs().max() / (before.max() - before.min()).clamp(min=1e-12)
    changed = {base[f"{name}.weight"].dtype for name in layout.adapted.keys() | layout.packed}
    changed |= {merged[name].dtype for name in layout.trained}
    return float(difference), max((TOLERANCE.get(dtype, COARSE) for dtype in changed), default=1e-5)
