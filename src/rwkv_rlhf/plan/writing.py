"""Layer profiles to start from, written rather than typed."""

from __future__ import annotations

import csv
import io
import math

from rwkv_rlhf.plan.profile import COLUMNS
from rwkv_rlhf.plan.rows import is_scaled, layer_names
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import peft_modes


def rank_for(kind: str) -> int:
    """Rank to start from. Bone and MiSS have one number for each input or output where the others have r of them."""
    return tables.ADAPTERS[kind].profile_rank if kind in tables.ADAPTERS else 16


def rates_for(kind: str, layers: int) -> tuple[float, float]:
    """(first, last) learning rate to start from: smaller for deeper models, a quarter for whole matrices."""
    first = 2e-4 if layers <= 12 else 2e-5 if layers <= 32 else 1e-5
    first = first / 4 if kind == "full" else first
    return first, first / 10


def profile_text(
    kind: str,
    layers: int,
    *,
    rank: int = 0,
    top_rank: int = 0,
    alpha: float = 0.0,
    dropout: float = 0.01,
    rates: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    ends: tuple[str, str] = ("freeze", "freeze"),
    reject: str = "",
) -> str:
    """The CSV of a profile of `layers` blocks, all of one `kind`: full, state (frozen, for --state 1) or an adapter.

    rank: 0 = 16, of Bone and MiSS 64. top_rank: the rank of the last blocks, reached by doubling; alpha / rank stays
    the same. alpha: 0 = 2 rank. rates: None = by depth. ends: kinds of the rows emb and head. Raises ValueError.
    """
    for word in (kind, *ends):
        if word not in (*peft_modes(), "freeze"):
            raise ValueError(f"{word}: must be one of {', '.join(map(str, peft_modes()))}")
    if layers < 1 or min(rank, top_rank, alpha) < 0:
        raise ValueError("layers must be at least 1; rank, top_rank and alpha cannot be negative")
    numbers = {"lr_init": (rates or (0, 0))[0], "lr_final": (rates or (0, 0))[1], "weight_decay": weight_decay}
    for name, value in (numbers | {"alpha": alpha, "dropout": dropout}).items():
        if not 0 <= value < (1 if name == "dropout" else math.inf):  # what read_profile would refuse
            raise ValueError(f"{name} {value}: must be a number from 0{' to below 1' * (name == 'dropout')}")
    least = rank or rank_for(kind)
    doublings = math.log2(top_rank / least) if top_rank else 0.0
    if doublings < 0 or doublings != int(doublings):
        raise ValueError(f"top_rank {top_rank} must be rank {least} times 1, 2, 4, 8, ...")
    scale = alpha / least if alpha else 2.0
    steps = int(doublings) + 1
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in layer_names(layers):
        mode = dict(zip(("emb", "head"), ends)).get(layer, kind)
        adapter = mode in tables.ADAPTERS
        here = least * 2 ** (int(layer) * steps // layers) if layer.isdigit() else rank or rank_for(mode)
        first, last = rates or rates_for(mode, layers)
        frozen = mode in ("freeze", "state")
        row = ["freeze" if frozen else mode, here if adapter else 0]
        row += [_number(scale * here if is_scaled(mode) else 0)]
        row += [_number(dropout if adapter and tables.ADAPTERS[mode].dropout else 0)]
        row += ["0", "0", "0"] if frozen else [_number(first), _number(last), _number(weight_decay)]
        row += ["0.1" if kind == "state" else "0.01", "0.001"] if layer.isdigit() else ["0", "0"]
        writer.writerow([layer, *row, "" if frozen else reject])
    return file.getvalue()


def _number(value: float) -> str:
    """0.00002 rather than 2e-05, which spreadsheets of some languages read as text."""
    return f"{value:.12f}".rstrip("0").rstrip(".") if value else "0"
