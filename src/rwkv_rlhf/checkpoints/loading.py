"""From a checkpoint to a model: built strictly, one tensor after the other, and its trained tensors put back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_rlhf.checkpoints.sidecar import read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import key_diff, read_tensors
from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.linear import Matrix, StorageSpec
from rwkv_rlhf.layers.placing import Layout, Report, matrices, place, report_of, wrap_layers
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.layout import frozen_layout, plan_layout
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import STATES, Sizes, heads_in, sizes_of, states_in
from rwkv_rlhf.ops.product_ways import PLAIN, Ways
from rwkv_rlhf.plan import Plan, is_new, is_scalar_head, is_token_table
from rwkv_rlhf.precision import wide_dtype
from rwkv_rlhf.settings import tables

log = logging.getLogger(__name__)

KEPT_PAGES = 1 << 20  # bytes of a file that may stay in memory: opening one of many names again takes longer
# Block 0 makes the values that later blocks mix in; some files carry its unused factors all the same.
OPTIONAL = frozenset(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))


@dataclass(frozen=True)
class BuildOptions:
    """How tensors become a model.

    Adapters and storage follow a ready `layout`, or a `plan` with `limited` and `rslora`; without either everything is
    frozen. `quant` is the storage of frozen matrices, where the layout does not say it. Trained tensors become float32
    masters, frozen ones the compute dtype or packed. With `share` frozen matrices are used as they lie in the file, in
    their own dtype, and cast when they are applied. PiSSA begins from the factors in `initial`, or else from
    `svd_niter` iterations; `seed` draws the adapters' first values. On the `device` meta the model has sizes without
    numbers. `grad_cp`, `wkv_backend` and `dropout` are those of `RWKV`, `ways` how a CPU multiplies by the matrices.
    """

    compute_dtype: torch.dtype
    plan: Plan | None = None
    layout: Layout | None = None
    quant: str = "none"
    limited: bool = False
    rslora: bool = False
    share: bool = False
    initial: Mapping[str, Tensor] | None = None
    svd_niter: int = 4
    seed: int = 0
    device: torch.device | str = "cpu"
    grad_cp: bool = False
    wkv_backend: str = "auto"
    dropout: float = 0.0
    ways: Ways = PLAIN


def file_sizes(path: str | Path) -> Sizes:
    """Sizes of the model in a checkpoint. Raises ValueError, with the file's name, as `read_tensors` and `sizes_of`."""
    return named_sizes(read_tensors(path), path)


def named_sizes(tensors: Mapping[str, Tensor], source: str | Path) -> Sizes:
    """As `sizes_of`; a ValueError begins with `source`, and says so when that is an adapter."""
    try:
        return sizes_of(tensors)
    except ValueError as error:
        if adapter := adapter_sentence(tensors, source):
            raise ValueError(adapter) from error
        raise ValueError(f"{source}: {error}") from error


def adapter_sentence(tensors: Mapping[str, Tensor], source: str | Path) -> str:
    """What to do about an adapter that stands where a model is needed; "" for anything else."""
    own = {part for facts in tables.ADAPTERS.values() for part in facts.tensors}
    try:
        sidecar = read_sidecar(source)
    except ValueError:
        sidecar = None
    if sidecar is None and not any(name.split(".")[-1] in own for name in tensors):
        return ""
    base = sidecar.base_file if sidecar is not None else ""
    return (
        f"{source} holds only what was trained{f' above {base}' if base else ''}, it is no model: give "
        f"{base or 'its base'} as the model (--load_model, --base_model) and this file as the adapter (--load_adapter, "
        "--lora_checkpoint)"
    )


def plain_model(sizes: Sizes, options: BuildOptions) -> RWKV:
    """An RWKV on the meta device, without adapters."""
    if sizes.version not in VERSIONS:
        raise ValueError(f"RWKV version {sizes.version} is not built yet; there is {', '.join(VERSIONS)}")
    with torch.device("meta"):
        return RWKV(
            sizes,
            compute_dtype=options.compute_dtype,
            grad_cp=options.grad_cp,
            wkv_backend=options.wkv_backend,
            dropout=options.dropout,
        )


def build_model(
    tensors: Mapping[str, Tensor],
    options: BuildOptions,
    *,
    source: str | Path = "the model",
    reopen: Callable[[], Mapping[str, Tensor]] | None = None,
) -> tuple[RWKV, Report]:
    """A model from base tensors, loaded one after the other.

    `source` names them in messages. `reopen`, if given, reads the tensors again at each block before which `KEPT_PAGES`
    were used, so that the system can take those back; `tensors` may then be on the meta device. Raises ValueError with
    the key diff unless names and shapes are exactly those of the model.
    """
    sizes = named_sizes(tensors, source)
    _check_frozen_head(tensors, options, source)
    sizes = _with_added(sizes, options)
    model = plain_model(sizes, options)
    expected = dict(model.named_parameters())
    new = {name for name in expected if is_new(name)}  # what the file lacks begins at zero
    difference = key_diff(tensors, expected, (OPTIONAL - expected.keys()) | new)
    if difference:
        raise ValueError(f"{source} is not an {sizes.version} model of {sizes.n_layer} layers: {difference}")
    if options.layout is not None:
        layout = options.layout
    elif options.plan is not None:
        layout = plan_layout(model, options.plan, quant=options.quant, limited=options.limited, rslora=options.rslora)
    else:
        layout = frozen_layout(model, options.quant)
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    wrap_layers(model, layout)
    spec = StorageSpec(
        options.compute_dtype,
        options.device,
        master=wide_dtype(options.compute_dtype),
        share=options.share,
        svd_niter=options.svd_niter,
    )
    dtypes = {}
    block, used = "", KEPT_PAGES
    for name, shape in shapes.items():
        if reopen is not None and block_of(name) != block:
            block = block_of(name)
            if used >= KEPT_PAGES:
                tensors = {}  # let the old pages go before the file is opened again
                tensors, used = reopen(), 0
        tensor = tensors[name] if name in tensors or name not in new else torch.zeros(shape)
        dtypes[name], used = tensor.dtype, used + tensor.nbytes
        place(model, name, tensor.reshape(shape), layout, spec, options.seed, options.initial)
    model.take_ways(options.ways)
    report = report_of(model, layout)
    report.dtypes = dtypes
    return model, report


def _with_added(sizes: Sizes, options: BuildOptions) -> Sizes:
    """The sizes of a file with the learnt states and the scalar head that training adds."""
    states: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    if options.layout is not None:
        states, heads = states_in(options.layout.trained), heads_of(options.layout)
    elif options.plan is not None:
        states, heads = options.plan.states, (options.plan.scalar_head,)
    return dataclasses.replace(
        sizes,
        states=tuple(name for name in STATES if name in (*sizes.states, *states)),
        heads=tuple(name for name in tables.SCALAR_HEADS if name in (*sizes.heads, *heads)),
    )


def heads_of(layout: Layout) -> tuple[str, ...]:
    """Which scalar heads train in a layout, whole or by an adapter."""
    return heads_in({*layout.trained, *(f"{name}.weight" for name in layout.adapted)})


def _check_frozen_head(tensors: Mapping[str, Tensor], options: BuildOptions, source: str | Path) -> None:
    """Refuse a scalar head that the plan freezes before it was ever trained: it would say 0 of everything."""
    head = options.plan.scalar_head if options.plan is not None and options.layout is None else ""
    if not head or f"{head}.weight" in tensors:
        return
    assert options.plan is not None
    row = options.plan.row_of(f"{head}.weight")
    if row.mode == "freeze":
        raise ValueError(
            f"{row.where}: column Mode: 'freeze', but {source} has no {head}.weight, and one that stays at zero says "
            "nothing: give full, or leave the row out"
        )


def block_of(name: str) -> str:
    """`blocks.3` for a tensor of block 3, and a prefix of its own for each other module."""
    return ".".join(name.split(".")[:2])


def load_model(path: str | Path, options: BuildOptions) -> tuple[RWKV, Report]:
    """The model in a checkpoint, and the report of its making. Raises ValueError in one sentence.

    Peak memory is the finished model and one block of the file.
    """
    tensors = {name: tensor.to("meta") for name, tensor in read_tensors(path).items()}
    return build_model(tensors, options, source=path, reopen=lambda: read_tensors(path))


def as_trained(path: str | Path, quant: str) -> Layout:
    """Small tensors in float32 and matrices packed as `quant`, as training holds them when adapters learn.

    Scores in the same precision are then those of the first training step.
    """
    tensors = read_tensors(path)
    weights = {
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not is_scalar_head(name)
    }
    linear = {name for name in weights if name != "emb.weight" and not is_token_table(name)}
    packed = {name.removesuffix(".weight") for name in linear} if quant != "none" else set()
    return Layout(trained=frozenset(tensors.keys() - weights), packed=frozenset(packed), store=quant)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint of training holds, by name: all that trains, and the frozen tensors of adapters (RejectParts).

    Those began at random: without them nothing can be merged.
    """
    adapters = {f"{name}.{part}" for name, layer in matrices(model) for part in layer.tensors}
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name in adapters}


def unused_tensors(model: RWKV, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What RWKV-LM's strict loading asks of block 0 of an RWKV-7, and nothing uses: from `base`, else zeros."""
    sizes = model.sizes
    rank = sizes.low_rank.get("v")
    if rank is None:
        return {}
    A, C = sizes.dim_att, sizes.n_embd
    shapes = {"v0": (1, 1, A), "v1": (C, rank), "v2": (rank, A)}
    named = {f"blocks.0.att.{name}": shape for name, shape in shapes.items()}
    return {
        name: base[name].to(torch.float32, copy=True) if name in base else torch.zeros(shape)
        for name, shape in named.items()
    }


def copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy `tensors`, read from `path`, into the `parameters` of these names.

    Raises ValueError with the key diff unless names and shapes are the same.
    """
    difference = key_diff(tensors, parameters, OPTIONAL - parameters.keys())
    if difference:
        raise ValueError(f"{path} is not an adapter of this model and plan: {difference}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name].reshape(parameter.shape))


def adopt_forms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let each adapter of `model` take the form that its tensors in a checkpoint have (`Adapter.adopt_form`)."""
    for name, layer in matrices(model):
        if isinstance(layer, Adapter):
            layer.adopt_form(tensors_of(name, layer, tensors))


def tensors_of(name: str, layer: Matrix, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of the layer `name` out of a checkpoint's, by their own names."""
    return {part: tensors[f"{name}.{part}"] for part in layer.tensors if f"{name}.{part}" in tensors}


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of training: its tensors replace exactly those that train in `model`.

    Raises ValueError with the key diff when the file has others, or of other shapes (another plan, other layers).
    """
    tensors = read_tensors(path)
    adopt_forms(model, tensors)
    copy_into(checkpoint_tensors(model), tensors, path)
    log.info("continued from %s", path)
