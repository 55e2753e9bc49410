"""What a plan makes of a model: which matrices get which adapter, which are packed, and which tensors train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_rlhf.layers.adaptation import Adaptation, RankError
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.linear import Linear, Matrix
from rwkv_rlhf.layers.placing import (
    Layout,
    adapter_class,
    matrices,
    wrapped,
)
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.plan import Plan, Row, is_scalar_head


def plan_layout(model: RWKV, plan: Plan, *, quant: str = "none", limited: bool = False, rslora: bool = False) -> Layout:
    """The `Layout` that a profile means for a plain model (real or on the meta device).

    Packed are the frozen matrices of rows that are not `full`, the embedding and scalar heads never. Raises ValueError
    for an unknown storage, an adapter that does not exist, one that a table cannot have, or a rank that a matrix cannot
    have.
    """
    store_class(quant)
    version = model.sizes.version
    trained = {name for name, _ in model.named_parameters() if plan.trains(name, version, limited)}
    adapted: dict[str, Adaptation] = {}
    packed: set[str] = set()
    rejected: set[str] = set()
    for name, layer in matrices(model):
        row = plan.adapts(name)
        if row is not None:
            with _naming(row):
                tensors = {f"{name}.{part}" for part in adapter_class(layer, name, row.mode).tensors}
                frozen = {tensor for tensor in tensors if row.rejects(tensor)}
                if frozen != tensors:
                    adapted[name] = Adaptation.make(row.mode, row.rank, row.alpha, row.dropout, rslora)
                    wrapped(layer, name, adapted[name])  # refuses an impossible rank before anything is read
                    rejected |= frozen
                    trained.discard(f"{name}.weight")
        trains = f"{name}.weight" in trained or plan.row_of(f"{name}.weight").mode == "full"
        if quant != "none" and packs(name, layer) and not trains:
            packed.add(name)
    busy = {plan.row_of(name).layer for name in (*trained, *(f"{name}.weight" for name in adapted))}
    idle = [layer for layer, row in plan.rows.items() if row.mode != "freeze" and row.layer not in busy]
    unmatched = (*idle, *unmatched_rejects(model, plan))
    return Layout(adapted, frozenset(packed), frozenset(trained), quant, unmatched, frozenset(rejected))


def packs(name: str, layer: Matrix) -> bool:
    """Whether the matrix `name` may be packed: not the embedding, nor a scalar head, which is one row."""
    return isinstance(layer, Linear) and not is_scalar_head(name)


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Adds to a mistake of mode or rank the place where the row was written."""
    try:
        yield
    except RankError as mistake:
        source = f"{row.where}: column Rank: '{row.rank}'" if row.where else f"{{lora_r}} {row.rank}"
        raise ValueError(f"{source}: {mistake}") from mistake
    except ValueError as mistake:
        raise ValueError(f"{row.where}: column Mode: {mistake}" if row.where else str(mistake)) from mistake


def unmatched_rejects(model: RWKV, plan: Plan) -> list[str]:
    """Entries of RejectParts that are in no name of a tensor of their row: "0 (RejectParts att.recptance)"."""
    names: dict[str, list[str]] = {layer: [] for layer in plan.rows}
    for name, _ in model.named_parameters():
        names[plan.row_of(name).layer].append(name)
    for name, layer in matrices(model):
        row = plan.row_of(name)
        if row.reject and row.mode in ADAPTERS:
            names[row.layer] += [f"{name}.{part}" for part in adapter_class(layer, name, row.mode).tensors]
    return [
        f"{layer} (RejectParts {part})"
        for layer, row in plan.rows.items()
        for part in row.reject
        if not any(part in name for name in names[layer])
    ]


def frozen_layout(model: RWKV, quant: str = "none") -> Layout:
    """Nothing trains; with `quant` linear layers are packed, scalar heads not. For running a model, not training."""
    store_class(quant)
    packed = frozenset(name for name, layer in matrices(model) if quant != "none" and packs(name, layer))
    return Layout(packed=packed, store=quant)
