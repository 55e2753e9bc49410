"""Which matrix gets which adapter and which storage, and the walk that puts them there from outside the model.

`plan_layout` turns a layer profile into a `Layout`, a sidecar holds one too; `replace` swaps the layers of a model that
is still on the meta device and `place` then takes one tensor after the other, so that no more than one dense matrix
lies beside the packed model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.adaptation import Adaptation, RankError, seeded
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.precision import wide_dtype

if TYPE_CHECKING:
    from rwkv_rlhf.plan import Plan, Row


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor of a model.

    `adapted`: adapter by layer name ("blocks.0.att.key"). `packed`: names of the layers whose matrix is kept as `store`
    says. `trained`: names of the base model's own parameters that train. Adapters' tensors always do, but for those in
    `held`, which RejectParts keeps as they began. `unmatched`: rows of the profile that found nothing to do, and the
    entries of RejectParts that are in no name of their row.
    """

    adapted: Mapping[str, Adaptation] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()
    store: str = "none"
    unmatched: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()


@dataclass
class Report:
    """What a model was made of: its layout, its numbers of parameters, and the dtypes that the base file has."""

    layout: Layout
    trained: int = 0
    frozen: int = 0
    packed: int = 0
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in sentences."""
        text = [
            f"parameters: {self.trained:,} train, {self.frozen:,} are frozen, "
            f"of which {self.packed:,} are packed as {self.layout.store}"
        ]
        if self.layout.unmatched:
            text.append(f"rows of the layer profile that matched nothing: {', '.join(self.layout.unmatched)}")
        return text


def matrices(model: nn.Module) -> Iterator[tuple[str, Linear | Embedding]]:
    """Every layer that can be adapted or packed, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding):
            yield name, module


def plan_layout(
    model: nn.Module, plan: Plan, *, quant: str = "none", limited: bool = False, rslora: bool = False
) -> Layout:
    """The `Layout` that a profile means for a plain model (real or on the meta device).

    Packed are the frozen matrices of rows that are not `full`, the embedding never. Raises ValueError for an unknown
    storage, an adapter that does not exist, or one that a table cannot have.
    """
    store_class(quant)
    version = model.sizes.version
    trained = {name for name, _ in model.named_parameters() if plan.trains(name, version, limited)}
    adapted, packed, held = {}, set(), set()
    for name, layer in matrices(model):
        row = plan.adapts(name)
        parts = _row_names(layer, name, row) if row is not None else ()
        rejected = {part for part in parts if row.rejects(part)}
        if rejected != set(parts):
            adapted[name] = Adaptation.make(row.mode, row.rank, row.alpha, row.dropout, rslora)
            _check_row(layer, name, adapted[name], row)
            held |= rejected
            trained.discard(f"{name}.weight")
        frozen = f"{name}.weight" not in trained
        if quant != "none" and isinstance(layer, Linear) and frozen and plan.row_of(f"{name}.weight").mode != "full":
            packed.add(name)
    busy = {plan.row_of(name).layer for name in (*trained, *(f"{name}.weight" for name in adapted))}
    idle = [layer for layer, row in plan.rows.items() if row.mode != "freeze" and row.layer not in busy]
    unmatched = (*idle, *unmatched_rejects(model, plan))
    return Layout(adapted, frozenset(packed), frozenset(trained), quant, unmatched, frozenset(held))


def _check_row(layer: Linear | Embedding, name: str, adaptation: Adaptation, row: Row) -> None:
    """Refuse a rank that does not fit the matrix before anything is read, with the place where it was said."""
    try:
        _adapter(layer, name, adaptation)
    except ValueError as mistake:
        said = f"{row.where}: column Rank: '{row.rank}'" if row.where else f"{{lora_r}} {row.rank}"
        raise ValueError(f"{said}: {mistake}") from mistake


def adapter_names(layer: Linear | Embedding, name: str, mode: str) -> tuple[str, ...]:
    """Names of the tensors that an adapter of `mode` has on the layer `name`. Raises ValueError if there is none."""
    return tuple(f"{name}.{part}" for part in _adapter_class(layer, name, mode).tensors)


def _row_names(layer: Linear | Embedding, name: str, row: Row) -> tuple[str, ...]:
    try:
        return adapter_names(layer, name, row.mode)
    except ValueError as mistake:
        raise ValueError(f"{row.where}: column Mode: {mistake}" if row.where else str(mistake)) from mistake


def unmatched_rejects(model: nn.Module, plan: Plan) -> list[str]:
    """Entries of RejectParts that are in no name of a tensor of their row: "0 (RejectParts att.recptance)"."""
    names: dict[str, list[str]] = {layer: [] for layer in plan.rows}
    for name, _ in model.named_parameters():
        names[plan.row_of(name).layer].append(name)
    for name, layer in matrices(model):
        row = plan.row_of(name)
        if row.reject and row.mode in ADAPTERS:
            names[row.layer] += adapter_names(layer, name, row.mode)
    return [
        f"{layer} (RejectParts {part})"
        for layer, row in plan.rows.items()
        for part in row.reject
        if not any(part in name for name in names[layer])
    ]


def frozen_layout(model: nn.Module, quant: str = "none") -> Layout:
    """Nothing trains; with `quant` every linear layer is packed. For running a model, not training it."""
    store_class(quant)
    packed = frozenset(name for name, layer in matrices(model) if quant != "none" and isinstance(layer, Linear))
    return Layout(packed=packed, store=quant)


def _adapter_class(layer: Linear | Embedding, name: str, mode: str) -> type[Linear] | type[Embedding]:
    if mode not in ADAPTERS:
        raise ValueError(f"layer {name}: mode {mode} is not one of the adapters {', '.join(ADAPTERS)}")
    found = ADAPTERS[mode].linear if isinstance(layer, Linear) else ADAPTERS[mode].embedding
    if found is None:
        raise ValueError(f"layer {name}: mode {mode} has no form for an embedding")
    return found


def adapter_for(name: str, layer: Linear | Embedding, layout: Layout) -> Linear | Embedding | None:
    """The adapter that `layout` has for the plain `layer`, on the meta device, or None. Raises ValueError."""
    if name not in layout.adapted:
        return None
    return _adapter(layer, name, layout.adapted[name])


def _adapter(layer: Linear | Embedding, name: str, adaptation: Adaptation) -> Linear | Embedding:
    try:
        return _adapter_class(layer, name, adaptation.mode).wrap(layer, adaptation)
    except RankError as mistake:
        raise RankError(f"layer {name}: mode {adaptation.mode}: {mistake}") from mistake


def replace(model: nn.Module, layout: Layout) -> None:
    """Swap each adapted layer for its adapter (on the meta device until `place`), in the plain `model`."""
    for name, layer in list(matrices(model)):
        adapter = adapter_for(name, layer, layout)
        if adapter is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapter)


def place(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    layout: Layout,
    spec: StorageSpec,
    seed: int = 0,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the base tensor `name` to the replaced `model`: trained = float32 master, frozen = dense or packed.

    `spec.store` is ignored: the layout says which matrices are packed. An adapter's first values depend on `seed`
    and the layer's name only, and where it begins from its matrix (PiSSA) on `initial`, if given: known factors by
    `<layer>.<name in the layer's initial>`. With `spec.share` frozen matrices stay as they come, in their dtype.
    Raises ValueError when `initial` lacks the factors of the layer or has them in another shape.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    trains = name in layout.trained
    if trains:
        spec = changed(spec, dtype=spec.master, share=False)
    if isinstance(module, Linear | Embedding):
        store = layout.store if module_name in layout.packed else "none"
        if spec.share:
            spec = changed(spec, dtype=tensor.dtype)
        known = known_factors(module, module_name, initial)
        module.load_weight(tensor, changed(spec, store=store, generator=seeded(seed, module_name), initial=known))
        if trains:
            module.weight.requires_grad_(True)
        for part in module.tensors if module.adaptation else ():
            getattr(module, part).requires_grad_(f"{module_name}.{part}" not in layout.held)
    else:
        assert leaf in module._parameters, name
        parameter = spec.dense(tensor)
        setattr(module, leaf, parameter.requires_grad_(trains))


def on_meta(model: nn.Module, layout: Layout, spec: StorageSpec) -> None:
    """As `place` of every tensor of the replaced `model`, but on the meta device: dtypes and sizes without numbers."""
    for name, parameter in list(model.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        own = isinstance(module, Linear | Embedding) and leaf in module.tensors
        if module_name in layout.packed and not own:
            store = store_class(layout.store)
            assert store is not None
            module.store, module.weight = store.on_meta(parameter.shape), None
            continue
        trains = name not in layout.held if own else name in layout.trained
        dtype = spec.master if own or trains else spec.dtype
        setattr(module, leaf, nn.Parameter(parameter.detach().to(dtype), requires_grad=trains))
    for _, layer in matrices(model):  # what an adapter began with, as large as the factors that it belongs to
        for part, like in zip(layer.initial, layer.tensors, strict=False):
            layer.register_buffer(part, getattr(layer, like).detach(), persistent=False)


def known_factors(
    module: Linear | Embedding, name: str, initial: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """What the adapter `module` of the layer `name` began with, out of `initial`; None when it is to be made anew.

    Raises ValueError when `initial` lacks it or has it in another shape.
    """
    if initial is None or not module.initial:
        return None
    found = {}
    for part, like in zip(module.initial, module.tensors, strict=True):
        factor = initial.get(f"{name}.{part}")
        wanted = getattr(module, like).shape
        if factor is None:
            raise ValueError(f"layer {name} has no initial factors among those that were given ({name}.{part})")
        if factor.shape != wanted:
            raise ValueError(f"the initial factors {name}.{part} are {tuple(factor.shape)} instead of {tuple(wanted)}")
        found[part] = factor
    return found


def report_of(model: nn.Module, layout: Layout) -> Report:
    """Counts of a model that has been placed."""
    report = Report(layout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            report.trained += parameter.numel()
        else:
            report.frozen += parameter.numel()
    report.packed = sum(layer.store.shape.numel() for name, layer in matrices(model) if name in layout.packed)
    report.frozen += report.packed
    return report


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    quant: str = "none",
    compute_dtype: torch.dtype,
    limited: bool = False,
    rslora: bool = False,
    seed: int = 0,
) -> Report:
    """Adapt, pack and freeze a plain model that already has its numbers, as `plan` says. Raises as `plan_layout`."""
    layout = plan_layout(model, plan, quant=quant, limited=limited, rslora=rslora)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    replace(model, layout)
    for name in list(tensors):
        tensor = tensors.pop(name)
        place(model, name, tensor, layout, storage_spec_for(compute_dtype, tensor.device), seed)
    return report_of(model, layout)


def storage_spec_for(
    compute_dtype: torch.dtype, device: torch.device | str = "cpu", share: bool = False, svd_niter: int = 4
) -> StorageSpec:
    """Frozen tensors in the compute dtype, trained ones in float32 (float64 in float64 runs)."""
    master = wide_dtype(compute_dtype)
    return StorageSpec(compute_dtype, device, master=master, share=share, svd_niter=svd_niter)
