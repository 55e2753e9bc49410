"""Adapters as folders of the PEFT library: `adapter_model.safetensors` beside `adapter_config.json`, and back.

| here | there |
|---|---|
| `<layer>.lora_A`, `.lora_B` | `base_model.model.<layer>.lora_A.weight`, `.lora_B.weight` |
| of an embedding | `base_model.model.<layer>.lora_embedding_A`, `.lora_embedding_B` |
| `.lora_M` (DoRA) | `.lora_magnitude_vector` |
| `.miss` | `.miss_block` |

Legend: r rank. Layout of PEFT 0.21.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import AdapterFile
from rwkv_rlhf.checkpoints.loading import file_sizes
from rwkv_rlhf.checkpoints.merging import Merged
from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_checkpoint
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.files import read_json_object, write_json
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.plan import is_scalar_head
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.tables import PeftFacts

log = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHOWN = 4  # names of tensors that are left out
PREFIX = "base_model.model."
LINEAR = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_M": "lora_magnitude_vector", "miss": "miss_block"}
EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
TABLES = ("emb", "head")
MOST = 1e30  # of any number in a configuration
# layers in a pattern: names, also with `.*` in them; expressions that could take for ever are none
NAMES = re.compile(r"\^?[\w.\\]+(?:\.\*[\w.\\]*){0,2}\$?")


class PeftAdapter(NamedTuple):
    """An adapter as PEFT has it; `left_out` names the tensors of the checkpoint that have no place in it."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    left_out: list[str]


class OwnAdapter(NamedTuple):
    """An adapter as this program has it: its tensors, and how each layer is adapted."""

    tensors: dict[str, Tensor]
    adapted: dict[str, Adaptation]


def to_peft_folder(file: AdapterFile, folder: Path, *, force: bool = False) -> str:
    """Write the adapters of `file` for PEFT; returns a sentence. Raises ValueError for what PEFT cannot hold.

    An adapter over a cold one means something over their merge only, and is refused unless `force`. What trained beside
    the adapters (LayerNorms, small vectors, whole matrices, states) has no place there: it is counted in a warning.
    """
    cold = Path(file.sidecar.cold_file).name if file.sidecar and file.sidecar.cold_sha256 else ""
    if cold and not force:
        raise ValueError(
            f"this adapter was trained over the cold adapter {cold}, and a PEFT adapter cannot say so: merge {cold} "
            "into the base model, use that as PEFT's base model, and give --force 1 here"
        )
    adapted = {name: how for name, how in file.layout.adapted.items() if not is_scalar_head(name)}
    tensors, config, left = to_peft(file.tensors, adapted, file.initial)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        log.warning(
            "%d trained tensors have no place in a PEFT adapter and are left out: %s%s; --limited_lora 1 trains none",
            *(len(left), ", ".join(left[:SHOWN]), more),
        )
    if file.initial and file.layout.packed:
        log.warning("a PiSSA adapter over %s matrices is exact in PEFT only over the same residual", file.layout.store)
    config["base_model_name_or_path"] = file.sidecar.base_file if file.sidecar and not cold else None
    write_tensors(tensors, folder / TENSORS)
    write_json(folder / CONFIG, config)
    return f"{counted(len(adapted), 'adapter')} for the PEFT library: {folder}"


def from_peft_folder(folder: Path, base: Path, output: Path, quant: str) -> str:
    """Write the PEFT adapter in `folder`, trained on `base`, as a checkpoint with a sidecar; returns a sentence.

    quant: how the base was stored in its training. Raises ValueError when it does not fit the base.
    """
    store_class(quant)
    if not (folder / CONFIG).exists():
        raise ValueError(f"--from_peft {folder}: there is no {CONFIG}")
    config = read_json_object(folder / CONFIG)
    base_tensors = read_tensors(base)
    try:
        tensors, adapted = from_peft(read_tensors(folder / TENSORS), config)
        tensors = without_tables(tensors, base_tensors, config)
    except ValueError as mistake:
        raise ValueError(f"--from_peft {folder}: {mistake}") from mistake
    own = {f"{layer}." for layer in adapted}
    trained = frozenset(name for name in tensors if f"{name.rpartition('.')[0]}." not in own)
    packed = frozenset(name for name in adapted if name != "emb") if quant != "none" else frozenset()
    layout = Layout(adapted, packed, trained, quant)
    sidecar = sidecar_of(file_sizes(base).version, layout, None, base)
    Merged(base_tensors, AdapterFile(folder, tensors, sidecar, layout, {}))  # refuses what does not fit
    write_checkpoint(tensors, sidecar, output)
    return f"{counted(len(adapted), 'adapter')} of {folder} for {base.name}: {output}"


def to_peft(
    tensors: Mapping[str, Tensor],
    adapted: Mapping[str, Adaptation],
    initial: Mapping[str, Tensor] | None = None,
    embeddings: Collection[str] = ("emb",),
) -> PeftAdapter:
    """A checkpoint's adapters for PEFT; what is no adapter's tensor is left out.

    A PiSSA adapter becomes a LoRA of rank 2r on the unchanged base, [B, -B0] [A; A0], with A0 and B0 from `initial`
    (`<layer>.lora_A_init`, ...); it is exact when the base was not packed. Raises ValueError for Bone, for modes that
    one PEFT adapter cannot hold together, and for DoRA's per-column variant.
    """
    if not adapted:
        raise ValueError("there is no adapter to convert")
    modes = list(dict.fromkeys(how.mode for how in adapted.values()))
    forms = {mode: facts for mode in modes if (facts := tables.ADAPTERS[mode].peft) is not None}
    if len(forms) < len(modes):
        raise ValueError(
            f"mode {', '.join(mode for mode in modes if mode not in forms)} has no form in the PEFT library"
        )
    if len({(form.kind, form.use_dora) for form in forms.values()}) > 1:
        raise ValueError(f"one PEFT adapter cannot hold modes {', '.join(modes)} together")
    found: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, how in adapted.items():
        parts = {part: tensors[f"{layer}.{part}"].detach() for part in tables.ADAPTERS[how.mode].tensors}
        if forms[how.mode].difference:
            parts = _difference(layer, parts, initial or {})
        if parts.get("lora_M", torch.empty(0)).dim() > 1:
            raise ValueError(f"{layer}.lora_M has one length a column, PEFT's DoRA has one a row")
        ranks[layer] = next(iter(parts.values())).shape[0]
        names = EMBEDDING if layer in embeddings else LINEAR
        found |= {f"{PREFIX}{layer}.{names[part]}": tensor.contiguous() for part, tensor in parts.items()}
    own = {f"{layer}.{part}" for layer, how in adapted.items() for part in tables.ADAPTERS[how.mode].tensors}
    return PeftAdapter(found, _config(adapted, ranks), [name for name in tensors if name not in own])


def _difference(layer: str, parts: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [f"{layer}.{part}_init" for part in parts]
    lost = [name for name in names if name not in initial]
    if lost:
        raise ValueError(f"a PiSSA adapter is nothing without its initial factors: {lost[0]} is missing")
    a0, b0 = (initial[name].detach().to(parts["lora_A"]) for name in names)
    return {"lora_A": torch.cat([parts["lora_A"], a0]), "lora_B": torch.cat([parts["lora_B"], -b0], dim=1)}


def _config(adapted: Mapping[str, Adaptation], ranks: Mapping[str, int]) -> dict[str, Any]:
    first = next(iter(adapted.values()))
    common = _most_common(ranks.values())
    dropout = _most_common(how.dropout for how in adapted.values())
    config = {"target_modules": sorted(adapted), "bias": "none", "inference_mode": True, "task_type": None, "r": common}
    peft = tables.ADAPTERS[first.mode].peft
    assert peft is not None, first.mode
    if peft.kind == "MISS":
        if len(set(ranks.values())) > 1:
            raise ValueError("a MiSS adapter of PEFT has one rank for all layers")
        return config | {"peft_type": "MISS", "miss_dropout": dropout, "init_weights": True}
    root = all(  # rsLoRA; a PiSSA adapter has no scale
        tables.ADAPTERS[how.mode].scaled
        and math.isclose(how.scaling, how.alpha / math.sqrt(how.rank))
        and not math.isclose(how.scaling, how.alpha / how.rank)
        for how in adapted.values()
    )
    alphas = {layer: how.scaling * (ranks[layer] ** (0.5 if root else 1)) for layer, how in adapted.items()}
    usual = _most_common(alphas.values())
    return config | {
        "peft_type": "LORA",
        "lora_alpha": usual,
        "lora_dropout": dropout,
        "use_rslora": root,
        "use_dora": peft.use_dora,
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != common},
        "alpha_pattern": {layer: alpha for layer, alpha in alphas.items() if alpha != usual},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _most_common(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> OwnAdapter:
    """PEFT's tensors by the names of this program. Tensors that are no adapter's keep their names.

    Raises ValueError for kinds that this program does not have, and for an adapter that belongs to a changed base.
    """
    _check_config(config)
    form = PeftFacts(config["peft_type"], bool(config.get("use_dora")))
    mode = next((mode for mode, facts in tables.ADAPTERS.items() if facts.peft == form), None)
    if mode is None:
        raise ValueError(f"adapter_config.json: peft_type {form.kind} with use_dora has no form in this program")
    names = {theirs: part for table in (LINEAR, EMBEDDING) for part, theirs in table.items()}
    names["lora_magnitude_vector.weight"] = "lora_M"
    found: dict[str, Tensor] = {}
    adapted: dict[str, Adaptation] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(PREFIX)
        theirs = next((ending for ending in names if plain.endswith(f".{ending}")), None)
        if theirs is None:
            found[plain] = tensor
            continue
        layer, part = plain.removesuffix(f".{theirs}"), names[theirs]
        found[f"{layer}.{part}"] = tensor
        if not tensor.dim():
            raise ValueError(f"{name} is a single number")
        if part == tables.ADAPTERS[mode].tensors[0]:
            adapted[layer] = _adaptation(layer, mode, tensor.shape[0], config)
    if not adapted:
        raise ValueError("the file holds no adapter of the PEFT library")
    return OwnAdapter(found, adapted)


def without_tables(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`tensors` without the base's own tables, which PEFT writes too where it saves with save_embedding_layers.

    Raises ValueError when one of them is not the base's and PEFT's configuration does not say that it was trained.
    """
    trained = config.get("modules_to_save") or ()
    found = dict(tensors)
    for layer in TABLES:
        for name in (f"{layer}.weight", f"{layer}.base_layer.weight"):
            if name not in found or (layer in trained and name == f"{layer}.weight"):
                continue
            table, own = found.pop(name), base.get(f"{layer}.weight")
            if own is None or own.shape != table.shape or not torch.equal(own.to(table.dtype), table):
                raise ValueError(
                    f"{name} in it is another table than that of the base model, and {CONFIG} does not name {layer} in "
                    "modules_to_save: give the base model that the adapter was trained on"
                )
    return found


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    kinds = sorted({facts.peft.kind for facts in tables.ADAPTERS.values() if facts.peft is not None})
    if kind not in kinds:
        raise ValueError(f"adapter_config.json: peft_type {kind} is not one of {', '.join(kinds)}")
    begun = config.get("init_lora_weights" if kind == "LORA" else "init_weights", True)
    if isinstance(begun, str) and begun.lower() not in ("gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"adapter_config.json: an adapter begun as {begun} belongs to a changed base or has another form; "
            "let PEFT save it with path_initial_model_for_weight_conversion first"
        )
    for name, usual in (("lora_alpha", None), ("lora_dropout", 0.0), ("miss_dropout", 0.0)):
        if kind == "LORA" or name == "miss_dropout":
            _number(name, config.get(name, usual))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("adapter_config.json: alpha_pattern must name layers and their alpha")
    for key, value in patterns.items():
        _number(f"alpha_pattern of {key}", value)
        if not NAMES.fullmatch(key):
            raise ValueError(f"adapter_config.json: alpha_pattern {key!r} is no name of a layer or end of one")
    for flag in ("fan_in_fan_out", "use_qalora", "layer_replication", "lora_bias"):
        if config.get(flag):
            raise ValueError(f"adapter_config.json: {flag} has no form in this program")


def _number(name: str, value: object) -> None:
    """ValueError unless `value` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MOST:
        raise ValueError(f"adapter_config.json: {name} is {value!r}, it must be a number")


def _adaptation(layer: str, mode: str, rank: int, config: Mapping[str, Any]) -> Adaptation:
    dropout = config.get(f"{config['peft_type'].lower()}_dropout", 0.0)
    if not tables.ADAPTERS[mode].scaled:
        return Adaptation.make(mode, rank, float(rank), dropout)
    # a pattern of PEFT is the end of a layer's name, or an expression for it
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", layer))
    return Adaptation.make(mode, rank, float(next(own, config["lora_alpha"])), dropout, bool(config.get("use_rslora")))
