"""Curves of a run as one PNG, drawn from metrics.jsonl alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rwkv_rlhf.reports.metrics import read_records
from rwkv_rlhf.settings.metrics import panels

log = logging.getLogger(__name__)


def draw_curves(folder: Path) -> Path | None:
    """Draw `folder/metrics.jsonl` into `folder/curves.png`; None (and one notice) without matplotlib or records."""
    train = read_records(folder / "metrics.jsonl", "train")
    held_out = read_records(folder / "metrics.jsonl", "val")
    if not train:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("curves.png is not drawn: pip install matplotlib")
        return None
    if any("accuracy" in record for record in held_out):  # a pair's loss is not the likelihood that is held out
        held_out = [{name: value for name, value in record.items() if name != "loss"} for record in held_out]
    logged = {name for record in (*train, *held_out) for name in record}
    drawn = {title: [name for name in names if name in logged] for title, names in panels(logged).items()}
    drawn = {title: names for title, names in drawn.items() if names}
    figure = Figure(figsize=(4 * len(drawn), 3), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()):
        for name in names:
            faint = 1.0 if name == names[0] else 0.3  # a line of single steps behind their running mean
            draw(axis, train, name, "-", linewidth=1.2, alpha=faint, label=f"{name}, training")
            draw(axis, held_out, name, "o-", markersize=4, label=f"{name}, held out")
        axis.legend(frameon=False, fontsize="small")
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def draw(axis: Any, records: list[dict[str, Any]], name: str, form: str, **style: Any) -> None:
    """One metric over the optimizer steps, where records have it."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if points:
        axis.plot(*zip(*points), form, **style)
