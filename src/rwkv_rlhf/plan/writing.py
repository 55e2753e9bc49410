"""Layer profiles to start from, written rather than typed."""

from __future__ import annotations

import csv
import io
import math

from rwkv_rlhf.plan.profile import COLUMNS
from rwkv_rlhf.plan.rows import layer_names
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import peft_modes


def rank_for(kind: str) -> int:
    """Rank to start from. Bone and MiSS have one number for each input or output where the others have r of them."""
    return tables.ADAPTERS[kind].profile_rank if kind in tables.ADAPTERS else 16


def rate_for(kind: str, layers: int) -> float:
    """First learning rate to start from: smaller for deeper models, a quarter for whole matrices."""
    rate = 2e-4 if layers <= 12 else 2e-5 if layers <= 32 else 1e-5
    return rate / 4 if kind == "full" else rate


def profile_text(
    kind: str,
    layers: int,
    *,
    rank: int = 0,
    top_rank: int = 0,
    alpha: float = 0.0,
    dropout: float = 0.01,
    lr_init: float | None = None,
    lr_final: float | None = None,
    weight_decay: float = 0.0,
    emb: str = "freeze",
    head: str = "freeze",
    reject: str = "",
) -> str:
    """The CSV of a profile of `layers` blocks, all of one `kind`: full, state (frozen, for --state 1) or an adapter.

    rank: 0 = 16, of Bone and MiSS 64. top_rank: the rank of the last blocks, reached by doubling; alpha / rank stays
    the same. alpha: 0 = 2 rank. lr_init: None = by depth; lr_final: None = a tenth of it. emb, head: kinds of these
    rows. Raises ValueError.
    """
    _check_kinds(kind, emb, head)
    if layers < 1 or min(rank, top_rank, alpha) < 0:
        raise ValueError("layers must be at least 1; rank, top_rank and alpha cannot be negative")
    _check_numbers(lr_init=lr_init or 0, lr_final=lr_final or 0, weight_decay=weight_decay, alpha=alpha)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: must be a number from 0 to below 1")
    least = rank or rank_for(kind)
    doublings = math.log2(top_rank / least) if top_rank else 0.0
    if doublings < 0 or doublings != int(doublings):
        raise ValueError(f"top_rank {top_rank} must be rank {least} times 1, 2, 4, 8, ...")
    steps = int(doublings) + 1
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for layer in layer_names(layers):
        mode = {"emb": emb, "head": head}.get(layer, kind)
        row: dict[str, object] = {**dict.fromkeys(COLUMNS, "0"), "Layer": layer, "Mode": mode, "RejectParts": reject}
        if mode in tables.ADAPTERS:
            here = least * 2 ** (int(layer) * steps // layers) if layer.isdigit() else rank or rank_for(mode)
            row["Rank"] = here
            if tables.ADAPTERS[mode].scaled:
                row["Alpha"] = _number((alpha / least if alpha else 2.0) * here)
            if tables.ADAPTERS[mode].dropout:
                row["Dropout"] = _number(dropout)
        if mode in ("freeze", "state"):
            row |= {"Mode": "freeze", "RejectParts": ""}
        else:
            first = rate_for(mode, layers) if lr_init is None else lr_init
            row["Weight_lr_init"] = _number(first)
            row["Weight_lr_final"] = _number(first / 10 if lr_final is None else lr_final)
            row["Weight_decay"] = _number(weight_decay)
        if layer.isdigit():
            first, last = (tables.STATE_LR_INIT, tables.STATE_LR_FINAL) if kind == "state" else (0.01, 0.001)
            row |= {"State_lr_init": _number(first), "State_lr_final": _number(last)}
        writer.writerow(row)
    return file.getvalue()


def _check_kinds(*words: str) -> None:
    """Raises ValueError for a word that no row may have."""
    for word in words:
        if word not in (*peft_modes(), "freeze"):
            raise ValueError(f"{word}: must be one of {', '.join(map(str, peft_modes()))}")


def _check_numbers(**numbers: float) -> None:
    """Raises ValueError for what `read_profile` would refuse."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value}: must be a number from 0")


def _number(value: float) -> str:
    """0.00002 rather than 2e-05, which spreadsheets of some languages read as text."""
    return f"{value:.12f}".rstrip("0").rstrip(".") if value else "0"
