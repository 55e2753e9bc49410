"""Adapters as the PEFT library stores them (`adapter_model.safetensors` and `adapter_config.json`), and back.

| here | there |
|---|---|
| `<layer>.lora_A`, `.lora_B` | `base_model.model.<layer>.lora_A.weight`, `.lora_B.weight` |
| of an embedding | `base_model.model.<layer>.lora_embedding_A`, `.lora_embedding_B` |
| `.lora_M` (DoRA) | `.lora_magnitude_vector` |
| `.miss` | `.miss_block` |

Legend: r rank. Layout of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.settings import tables

PREFIX = "base_model.model."
LINEAR = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_M": "lora_magnitude_vector", "miss": "miss_block"}
EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

MOST = 1e30  # of any number in a configuration
# layers in a pattern: names, also with `.*` in them; expressions that could take for ever are none
NAMES = re.compile(r"\^?[\w.\\]+(?:\.\*[\w.\\]*){0,2}\$?")


def to_peft(
    tensors: Mapping[str, Tensor],
    adapted: Mapping[str, Adaptation],
    initial: Mapping[str, Tensor] | None = None,
    embeddings: Collection[str] = ("emb",),
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """(tensors, config, names of `tensors` that are left out because PEFT has no place for them: no adapter's).

    A PiSSA adapter becomes a LoRA of rank 2r on the unchanged base, [B, -B0] [A; A0], with A0 and B0 from `initial`
    (`<layer>.lora_A_init`, ...); it is exact when the base was not packed. Raises ValueError for Bone, for modes that
    one PEFT adapter cannot hold together, and for DoRA's per-column variant.
    """
    if not adapted:
        raise ValueError("there is no adapter to convert")
    kinds = {how.mode: tables.ADAPTERS[how.mode].peft for how in adapted.values()}
    if None in kinds.values():
        raise ValueError(f"mode {', '.join(m for m in kinds if not kinds[m])} has no form in the PEFT library")
    if len({(peft.kind, peft.use_dora) for peft in kinds.values() if peft}) > 1:
        raise ValueError(f"one PEFT adapter cannot hold modes {', '.join(kinds)} together")
    found: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, how in adapted.items():
        parts = {part: tensors[f"{layer}.{part}"].detach() for part in tables.ADAPTERS[how.mode].tensors}
        if kinds[how.mode].difference:
            parts = _difference(layer, parts, initial or {})
        if parts.get("lora_M", torch.empty(0)).dim() > 1:
            raise ValueError(f"{layer}.lora_M has one length a column, PEFT's DoRA has one a row")
        ranks[layer] = next(iter(parts.values())).shape[0]
        names = EMBEDDING if layer in embeddings else LINEAR
        found |= {f"{PREFIX}{layer}.{names[part]}": tensor.contiguous() for part, tensor in parts.items()}
    own = {f"{layer}.{part}" for layer, how in adapted.items() for part in tables.ADAPTERS[how.mode].tensors}
    return found, _config(adapted, ranks), [name for name in tensors if name not in own]


def _difference(layer: str, parts: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [f"{layer}.{part}_init" for part in parts]
    lost = [name for name in names if name not in initial]
    if lost:
        raise ValueError(f"a PiSSA adapter is nothing without its initial factors: {lost[0]} is missing")
    a0, b0 = (initial[name].detach().to(parts["lora_A"]) for name in names)
    return {"lora_A": torch.cat([parts["lora_A"], a0]), "lora_B": torch.cat([parts["lora_B"], -b0], dim=1)}


def _config(adapted: Mapping[str, Adaptation], ranks: Mapping[str, int]) -> dict[str, Any]:
    first = next(iter(adapted.values()))
    common = Counter(ranks.values()).most_common(1)[0][0]
    dropout = Counter(how.dropout for how in adapted.values()).most_common(1)[0][0]
    config = {"target_modules": sorted(adapted), "bias": "none", "inference_mode": True, "task_type": None, "r": common}
    peft = tables.ADAPTERS[first.mode].peft
    assert peft is not None, first.mode
    if peft.kind == "MISS":
        if len(set(ranks.values())) > 1:
            raise ValueError("a MiSS adapter of PEFT has one rank for all layers")
        return config | {"peft_type": "MISS", "miss_dropout": dropout, "init_weights": True}
    root = all(_is_rslora(how) for how in adapted.values())
    alphas = {layer: how.scaling * (ranks[layer] ** (0.5 if root else 1)) for layer, how in adapted.items()}
    usual = Counter(alphas.values()).most_common(1)[0][0]
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


def _is_rslora(how: Adaptation) -> bool:
    plain, root = how.alpha / how.rank, how.alpha / math.sqrt(how.rank)
    return tables.ADAPTERS[how.mode].scaled and math.isclose(how.scaling, root) and not math.isclose(how.scaling, plain)


def from_peft(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Adaptation]]:
    """(tensors by the names of this program, adapter of each layer). Tensors that are no adapter's keep their names.

    Raises ValueError for kinds that this program does not have, and for an adapter that belongs to a changed base.
    """
    _check_config(config)
    miss = config["peft_type"] == "MISS"
    mode = "miss" if miss else "dora" if config.get("use_dora") else "lora"
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
        if part in ("lora_A", "miss"):
            adapted[layer] = _adaptation(layer, mode, tensor.shape[0], config)
    if not adapted:
        raise ValueError("the file holds no adapter of the PEFT library")
    return found, adapted


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "MISS"):
        raise ValueError(f"adapter_config.json: peft_type {kind} is not one of LORA, MISS")
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
    if type(value) not in (int, float) or not 0 <= value < MOST:
        raise ValueError(f"adapter_config.json: {name} is {value!r}, it must be a number")


def _adaptation(layer: str, mode: str, rank: int, config: Mapping[str, Any]) -> Adaptation:
    if mode == "miss":
        return Adaptation.make(mode, rank, float(rank), config.get("miss_dropout", 0.0))
    alpha = _by_pattern(layer, config.get("alpha_pattern") or {}, config["lora_alpha"])
    return Adaptation.make(mode, rank, float(alpha), config.get("lora_dropout", 0.0), bool(config.get("use_rslora")))


def _by_pattern(layer: str, patterns: Mapping[str, float], usual: float) -> float:
    """A pattern of PEFT is the end of a layer's name, or an expression for it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), usual)
