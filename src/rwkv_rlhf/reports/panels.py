"""Which lines stand in which panel of a page: from the table of metrics and what was logged, as JSON values."""

from __future__ import annotations

from typing import Any

from rwkv_rlhf.reports.records import RAW_POINTS, SMOOTH_POINTS, Line, Records, smoothed, thinned
from rwkv_rlhf.settings.metrics import METRICS, REWARDS, panels

HELD_OUT_LOSS = "loss of the held-out answers"  # a likelihood, where what is minimised in training is another number
RAW, SMOOTH, HELD = "raw", "smooth", "held"


def unit_of(names: list[str]) -> str:
    """The unit of a panel's lines, "" for pure numbers."""
    metric = METRICS.get(names[0]) or METRICS[f"{REWARDS}NAME"]
    return metric.unit


def panel(title: str, names: list[str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A panel; a title that says its unit itself says it once."""
    plain, _, said = title.partition(", ")
    return {"title": plain, "unit": unit_of(names) or said, "lines": lines}


def logged_panels(*runs: Records) -> dict[str, list[str]]:
    """Title -> metrics, of the panels for which any of the runs has logged something."""
    logged = {name for run in runs for name in (*run.train, *run.held_out)}
    found = {title: [name for name in names if name in logged] for title, names in panels(logged).items()}
    return {title: names for title, names in found.items() if names}


def _points(line: Line) -> dict[str, list[float]]:
    return {"x": line.steps.tolist(), "y": [float(f"{value:.6g}") for value in line.values.tolist()]}


def _training(run: Records, name: str, label: str, colour: int, raw: bool = True) -> list[dict[str, Any]]:
    """The single steps, faint, and their means; a line of few steps is drawn as it is."""
    line = run.train[name].line()
    means = thinned(smoothed(line), SMOOTH_POINTS)
    found = [{"kind": SMOOTH, "label": label, "colour": colour} | _points(means)]
    if raw:
        single = {"kind": RAW, "label": f"{label}, single steps", "colour": colour}
        found.insert(0, single | _points(thinned(line, RAW_POINTS)))
    return found


def _held_out(run: Records, name: str, label: str, colour: int) -> dict[str, Any]:
    line = thinned(run.held_out[name].line(), RAW_POINTS)
    return {"kind": HELD, "label": label, "colour": colour} | _points(line)


def preferences(run: Records) -> bool:
    """Whether the held-out loss is a likelihood of answers, and not what training minimises."""
    return "accuracy" in run.held_out


def panels_of(run: Records) -> list[dict[str, Any]]:
    """The panels of one run: training and held-out numbers of one quantity in one panel."""
    found = []
    for title, names in logged_panels(run).items():
        lines: list[dict[str, Any]] = []
        apart = None
        for name in names:
            if name in run.train:
                lines += _training(run, name, f"{name}, training", len({line["colour"] for line in lines}))
            if name in run.held_out:
                own = _held_out(run, name, f"{name}, held out", len({line["colour"] for line in lines}))
                if name == "loss" and preferences(run):
                    apart = {"title": HELD_OUT_LOSS, "unit": "nats/token", "lines": [own | {"colour": 1}]}
                else:
                    lines.append(own)
        if lines:
            found.append(panel(title, names, lines))
        if apart is not None:
            found.append(apart)
    return found


def compared_panels(runs: dict[str, Records]) -> list[dict[str, Any]]:
    """The panels of several runs: one colour a run, the held-out numbers dashed."""
    found = []
    for title, names in logged_panels(*runs.values()).items():
        for name in names:
            lines = []
            for colour, (label, run) in enumerate(runs.items()):
                if name in run.train:
                    lines += _training(run, name, f"{label}, training", colour, raw=False)
                if name in run.held_out:
                    lines.append(_held_out(run, name, f"{label}, held out", colour))
            if lines:
                shown = title if len(names) == 1 else f"{title}: {name}"
                found.append(panel(shown, [name], lines))
    return found
