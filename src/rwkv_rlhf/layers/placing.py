"""The walk that gives each matrix of a model its adapter and its storage, from outside the model.

A `Layout` says which: `model.layout` makes one from a layer profile, a sidecar holds one. `wrap_layers` swaps the
layers of a model that is still on the meta device; `place` then loads one tensor after the other, so that no more than
one dense matrix lies beside the packed model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.adaptation import Adaptation, RankError, seeded
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.linear import Linear, Matrix, StorageSpec
from rwkv_rlhf.plan import is_token_table


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor of a model.

    `adapted`: adapter by layer name ("blocks.0.att.key"). `packed`: names of the layers whose matrix is kept as `store`
    says. `trained`: names of the base model's own parameters that train. Adapters' tensors always train, except those
    in `rejected`, which RejectParts keeps at their first values. `unmatched`: rows of the profile that found nothing to
    do, and the entries of RejectParts that are in no name of their row.
    """

    adapted: Mapping[str, Adaptation] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()
    store: str = "none"
    unmatched: tuple[str, ...] = ()
    rejected: frozenset[str] = frozenset()

    @property
    def modes(self) -> frozenset[str]:
        """The modes of the adapters that occur."""
        return frozenset(how.mode for how in self.adapted.values())


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
        whole = self.trained + self.frozen
        packed = f", of which {self.packed:,} are packed as {self.layout.store}" if self.packed else ""
        text = [
            f"parameters: {self.trained:,} train ({self.trained / max(1, whole):.2%} of {whole:,}), "
            f"{self.frozen:,} are frozen{packed}"
        ]
        by_token = set(filter(is_token_table, self.dtypes))
        if kept := by_token - self.layout.trained:
            text.append(f"{len(kept)} tables of DeepEmbed (s_emb) stay frozen; --train_tables 1 is what trains them")
        if learnt := by_token & self.layout.trained:
            text.append(f"{len(learnt)} tables of DeepEmbed (s_emb) train, in each step the rows of its tokens")
        if self.layout.unmatched:
            text.append(f"rows of the layer profile that matched nothing: {', '.join(self.layout.unmatched)}")
        return text


def matrices(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """Every layer that can be adapted or packed, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            yield name, module


def adapter_class(layer: Matrix, name: str, mode: str) -> type[Adapter]:
    """The adapter of `mode` for the layer `name`. Raises ValueError if there is none."""
    if mode not in ADAPTERS:
        raise ValueError(f"layer {name}: mode {mode} is not one of the adapters {', '.join(ADAPTERS)}")
    found = ADAPTERS[mode].linear if isinstance(layer, Linear) else ADAPTERS[mode].embedding
    if found is None:
        raise ValueError(f"layer {name}: mode {mode} has no form for an embedding")
    return found


def wrapped(layer: Matrix, name: str, adaptation: Adaptation) -> Adapter:
    """An adapter, on the meta device, for the plain `layer`. Raises ValueError; RankError for an impossible rank."""
    try:
        return adapter_class(layer, name, adaptation.mode).wrap(layer, adaptation)
    except RankError as mistake:
        raise RankError(f"layer {name}: mode {adaptation.mode}: {mistake}") from mistake


def wrap_layers(model: nn.Module, layout: Layout) -> None:
    """Swap each adapted layer of the plain `model` for its adapter, on the meta device until `place`."""
    for name, layer in list(matrices(model)):
        if name in layout.adapted:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrapped(layer, name, layout.adapted[name]))


def place(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    layout: Layout,
    spec: StorageSpec,
    seed: int = 0,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Load the base tensor `name` into the wrapped `model`: trained as a `spec.master`, frozen dense or packed.

    `spec.store` is ignored: the layout says which matrices are packed. An adapter's first values depend on `seed`
    and the layer's name only, and where it begins from its matrix (PiSSA) on `initial`, if given: known factors by
    `<layer>.<name in the layer's initial>`. With `spec.share` frozen matrices stay as they come, in their dtype. On the
    meta device `tensor` only gives the dtype that `spec.share` keeps: sizes without numbers.
    Raises ValueError when `initial` lacks the factors of the layer or has them in another shape.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    trains = name in layout.trained
    if trains:
        spec = replace(spec, dtype=spec.master, share=False)
    if not isinstance(module, Matrix):
        assert leaf in module._parameters, name
        setattr(module, leaf, spec.dense(tensor).requires_grad_(trains))
        return
    if spec.share:
        spec = replace(spec, dtype=tensor.dtype)
    spec = replace(spec, store=layout.store if module_name in layout.packed else "none")
    if torch.device(spec.device).type == "meta":
        module.on_meta(spec)
    else:
        factors = layer_factors(module, module_name, initial) if initial is not None else None
        module.load_weight(tensor, replace(spec, generator=seeded(seed, module_name), initial=factors))
    if trains:
        assert module.weight is not None
        module.weight.requires_grad_(True)
    for part in module.tensors:
        getattr(module, part).requires_grad_(f"{module_name}.{part}" not in layout.rejected)


def layer_factors(layer: Matrix, name: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What the adapter `layer`, called `name`, began with, out of `factors`; None for one that keeps none.

    Raises ValueError when `factors` lacks it or has it in another shape.
    """
    found = {}
    for part, like in zip(layer.initial, layer.tensors, strict=False):
        factor, shape = factors.get(f"{name}.{part}"), getattr(layer, like).shape
        if factor is None:
            raise ValueError(f"layer {name} has no initial factors among those that were given ({name}.{part})")
        if factor.shape != shape:
            raise ValueError(f"the initial factors {name}.{part} are {tuple(factor.shape)} instead of {tuple(shape)}")
        found[part] = factor
    return found or None


def report_of(model: nn.Module, layout: Layout) -> Report:
    """Counts of a model that has been placed."""
    report = Report(layout)
    for parameter in model.parameters():
        if parameter.requires_grad:
            report.trained += parameter.numel()
        else:
            report.frozen += parameter.numel()
    report.packed = sum(layer.shape.numel() for name, layer in matrices(model) if name in layout.packed)
    report.frozen += report.packed
    return report
