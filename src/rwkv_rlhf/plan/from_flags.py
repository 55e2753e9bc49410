"""A plan from the settings: from the layer profile that they name, or the same mode for all blocks.

Sentences write `{name}` for the flag of a setting; the command line spells them.
"""

import dataclasses
import re

from rwkv_rlhf.plan.profile import read_profile
from rwkv_rlhf.plan.rows import PARTS, Plan, Row, layer_names
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config, peft_modes


def plan_for(config: Config, n_layer: int) -> Plan:
    """The plan that the settings ask for: the layer profile, or one made from {peft} and its companions.

    n_layer: blocks of the model. Raises ValueError as `read_profile` and `make_plan` do.
    """
    rates = {"lr_init": config.lr_init, "lr_final": config.lr_final, "weight_decay": config.weight_decay}
    if config.layer_profile:
        plan = read_profile(config.layer_profile, n_layer, own_rates=config.lr_advanced, **rates)
    else:
        plan = make_plan(
            config.peft,
            n_layer,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            parts=config.lora_parts,
            layers=config.lora_layers,
            **rates,
        )
    states: tuple[str, ...] = ()
    if config.state:
        states = ("att.time_state", "att.shift_state", "ffn.shift_state") if config.state_shift else ("att.time_state",)
    head = config.loss_facts.scalar_head
    return dataclasses.replace(
        plan,
        rows=_rows_for(plan, head, config),
        states=states,
        lora_plus=config.lora_plus,
        scalar_head=head,
        predicts=config.loss_facts.predicts,
        tables=config.train_tables,
    )


def _rows_for(plan: Plan, head: str, config: Config) -> dict[str, Row]:
    """The rows of `plan` with one for the scalar head `head` of the run ("" for none), and for no other: where the
    profile has none it learns at the rates of the command line."""
    rows = {layer: row for layer, row in plan.rows.items() if layer == head or layer not in tables.SCALAR_HEADS}
    rates = config.lr_init, config.lr_final
    return {**rows, head: rows.get(head) or Row(head, "full", 0, 0.0, 0.0, *rates, 0.0, *rates)} if head else rows


def make_plan(
    peft: str,
    n_layer: int,
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.01,
    parts: str = "att,ffn,ln,time",
    layers: str = "",
    lr_init: float,
    lr_final: float,
    weight_decay: float = 0.0,
) -> Plan:
    """The same mode for all blocks.

    peft: `full` trains everything, emb and head too (training from zero needs them); an adapter or `state` leaves emb
    and head frozen. parts: comma list out of att, ffn, ln, time; layers: blocks that learn, such as "0-3 25-31", the
    others are frozen. Raises ValueError for unknown words and for block numbers that the model does not have.
    """
    if peft not in peft_modes():
        raise ValueError(f"{{peft}} {peft}: must be one of {', '.join(map(str, peft_modes()))}")
    chosen = parse_layers(layers, n_layer)
    touched = frozenset(word.strip() for word in parts.split(",") if word.strip())
    if not touched <= set(PARTS):
        raise ValueError(f"{{lora_parts}} {parts}: must be a comma list of {', '.join(PARTS)}")

    def row(layer: str) -> Row:
        inside = peft == "full" or (layer.isdigit() and int(layer) in chosen)
        mode = peft if inside and peft != "state" else "freeze"
        return Row(layer, mode, rank, alpha, dropout, lr_init, lr_final, weight_decay, lr_init, lr_final)

    return Plan({layer: row(layer) for layer in layer_names(n_layer)}, touched)


def parse_layers(text: str, n_layer: int) -> frozenset[int]:
    """The block numbers in "0-3 25-31" (blanks or commas between); all if `text` is empty. Raises ValueError."""
    if not text.strip():
        return frozenset(range(n_layer))
    chosen: set[int] = set()
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not match:
            raise ValueError(f"{{lora_layers}} {text}: {word!r} is not a block such as 3 or a range such as 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < n_layer:
            raise ValueError(f"{{lora_layers}} {text}: {word!r} is not within blocks 0-{n_layer - 1}")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)
