"""Curves of a run as one PNG and a page that opens without a network, drawn from metrics.jsonl alone."""

from __future__ import annotations

import base64
import html
import logging
from pathlib import Path

from rwkv_rlhf.reports.metrics import read_records

log = logging.getLogger(__name__)

# title, the fields drawn in it (train records), the fields drawn as dots (validation records)
PANELS = (
    ("loss", ("loss",), ("loss",)),
    ("preference accuracy", ("pref_percentage",), ("accuracy",)),
    ("margin of rewards", ("margin",), ()),
    ("KL to the start model, nats a token", (), ("kl",)),
    ("learning rate", ("lr",), ()),
    ("tokens per second", ("tokens_per_s",), ()),
)


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
    drawn = {name for record in train for name in record}, {name for record in held_out for name in record}
    panels = [panel for panel in PANELS if drawn[0] & set(panel[1]) or (not panel[1] and drawn[1] & set(panel[2]))]
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (title, lines, dots) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in lines:
            points = [(r["step"], r[name]) for r in train if r.get(name) is not None]
            axis.plot(*zip(*points), linewidth=1.2, label="training")
        for name in dots:
            points = [(r["step"], r[name]) for r in held_out if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), "o-", markersize=4, label="held out")
                axis.legend(frameon=False)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def write_report(folder: Path, settings: dict[str, object]) -> None:
    """Rewrite `folder/report.html`: the curves inside the page and every setting of the run."""
    picture = draw_curves(folder)
    image = ""
    if picture is not None:
        image = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items()
    )
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(folder.name)}</title>
<style>body{{font:14px sans-serif;margin:2em}}td{{padding:0 1em 0 0}}img{{max-width:100%}}</style>
<h1>{html.escape(folder.name)}</h1>{image}<h2>Settings</h2><table>{rows}</table>
"""
    (folder / "report.html").write_text(page, encoding="utf-8")
