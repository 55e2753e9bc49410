"""What a run takes from the adapter that it goes on with, where nothing else was typed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterable
from typing import Any

from rwkv_rlhf.checkpoints.adapter_files import adapter_tensor_names
from rwkv_rlhf.checkpoints.sidecar import Sidecar, read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.plan import is_matrix, is_norm, is_scalar_head, is_scaled, is_state, is_token_table
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import PLAN_FLAGS, check, trains

log = logging.getLogger(__name__)

STORAGE = ("quant", "quant_mode")
# what may not differ from the file, by the words of its sentence
FIXED = {"peft": "mode", "lora_r": "rank", "lora_alpha": "alpha"}


def with_adapter(config: Config) -> Config:
    """The Config with mode, rank, alpha, parts and storage of --load_adapter, as its sidecar says they were, where they
    were not typed; a layer profile that was typed says all but the storage.

    Raises ValueError when a typed mode, rank or alpha is another one, and where only a layer profile can say what was
    trained.
    """
    if not config.load_adapter or not trains(config):
        return config
    sidecar = read_sidecar(config.load_adapter)
    if sidecar is None:
        typed = [name for name in PLAN_FLAGS if name in config.given]
        if typed and not {"peft", "layer_profile"} & config.given:
            raise ValueError(
                f"{{load_adapter}} {config.load_adapter} has no .json beside it, so {{{typed[0]}}} needs {{peft}}, the "
                "kind of adapter that it is"
            )
        return config
    found: dict[str, Any] = {}
    if not config.layer_profile:
        found = {name: value for name, value in plan_of(config, sidecar).items() if name not in config.given}
    if not {*STORAGE} & config.given:
        found |= {"quant": sidecar.quant_mode != tables.DENSE, "quant_mode": sidecar.quant_mode}
    changed = {name: value for name, value in found.items() if getattr(config, name) != value}
    if not changed:
        return config
    words = ", ".join(f"{name} {int(value) if isinstance(value, bool) else value}" for name, value in changed.items())
    log.info("as %s was trained: %s", config.load_adapter, words)
    config = dataclasses.replace(config, **changed)
    check(config)
    return config


def plan_of(config: Config, sidecar: Sidecar) -> dict[str, Any]:
    """The settings of a plan without a layer profile by which --load_adapter was trained, by name; none of a checkpoint
    that holds whole matrices only. Raises ValueError."""
    path, adapted = config.load_adapter, sidecar.adapted
    own = {f"{name}.{part}" for name, how in adapted.items() for part in adapter_tensor_names(how.mode)}
    beside = [name for name in read_tensors(path) if name not in own and not is_scalar_head(name)]
    states, by_token = [name for name in beside if is_state(name)], [name for name in beside if is_token_table(name)]
    rest = [name for name in beside if name not in {*states, *by_token}]
    found: dict[str, Any] = {"state": bool(states), "state_shift": any("shift_state" in name for name in states)}
    found["train_tables"] = bool(by_token)
    if not adapted:
        return {"peft": "state", **found} if states and not (rest or by_token) else {}
    ways = {(how.mode, how.rank, how.alpha, how.scaling) for how in adapted.values()}
    inside = all(name.startswith("blocks.") for name in (*adapted, *rest))
    if len(ways) > 1 or not inside or any(map(is_matrix, rest)):
        raise ValueError(
            f"{{load_adapter}} {path} was trained by a layer profile, as its layers are not all adapted alike: give "
            "that profile again with {layer_profile}"
        )
    how = next(iter(adapted.values()))
    blocks = {name.split(".")[1] for name in adapted}
    every = {row["layer"] for row in sidecar.plan if row["layer"].isdigit()}
    found |= {
        "peft": how.mode,
        "lora_r": how.rank,
        "rslora": root_scaled(how),
        "lora_parts": ",".join(parts_of(adapted, rest)) if rest else Config.lora_parts,
        "lora_layers": "" if blocks == every else " ".join(sorted(blocks, key=int)),
        "limited_lora": not rest,
    }
    if is_scaled(how.mode):
        found["lora_alpha"] = how.alpha
    if tables.ADAPTERS[how.mode].dropout:
        found["lora_dropout"] = how.dropout
    for name, word in FIXED.items():
        typed = getattr(config, name)
        if name in config.given and name in found and typed != found[name]:
            raise ValueError(
                f"{{{name}}} {typed}, but {{load_adapter}} {path} was trained with {word} {found[name]}: leave "
                f"{{{name}}} out, or begin a new adapter without {{load_adapter}}"
            )
    return found


def root_scaled(how: Adaptation) -> bool:
    """Whether alpha was divided by the root of the rank."""
    return is_scaled(how.mode) and how.rank > 1 and math.isclose(how.scaling, how.alpha / math.sqrt(how.rank))


def parts_of(adapted: Iterable[str], rest: Collection[str]) -> list[str]:
    """The words of --lora_parts for adapted matrices and the other trained tensors of blocks."""
    found = {name.split(".")[2] for name in adapted}
    norms = {is_norm(name) for name in rest}
    return [*sorted(found), *(["ln"] if True in norms else []), *(["time"] if False in norms else [])]
