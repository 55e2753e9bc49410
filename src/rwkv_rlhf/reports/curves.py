"""Curves of a run as one PNG, drawn from metrics.jsonl alone."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from rwkv_rlhf.reports.metrics import read_records
from rwkv_rlhf.settings.metrics import panels

log = logging.getLogger(__name__)

COLUMNS = 4  # panels side by side


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
    columns = min(len(drawn), COLUMNS)
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(drawn) :]:
        axis.remove()
    for axis, (title, names) in zip(axes, drawn.items()):
        for name in names:
            faint = 1.0 if name == names[0] else 0.3  # a line of single steps behind their running mean
            draw(axis, train, name, "-", linewidth=1.2, alpha=faint, label=f"{name}, training")
            draw(axis, held_out, name, "o-", markersize=4, label=f"{name}, held out")
        # not "best": looking for it takes longer than drawing, and says so
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
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
