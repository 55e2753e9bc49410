"""report.html: a run on one page that opens without a network, from what lies in the run's folder."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.reports.metrics import METRICS as METRICS_FILE
from rwkv_rlhf.reports.panels import panels_of
from rwkv_rlhf.reports.records import Records, ends
from rwkv_rlhf.reports.run_facts import ENDED, LOST, RUNNING, RunFacts, facts_of
from rwkv_rlhf.reports.samples import FixedAnswers, rollout_answers
from rwkv_rlhf.reports.words import duration, figure, size
from rwkv_rlhf.settings.config_file import RUN_FILE

PAGE = "report.html"
HERE = Path(__file__).parent


class Run(NamedTuple):
    """A folder as a page sees it."""

    folder: Path
    records: Records
    facts: RunFacts

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that differs from its default, as the run logged them."""
        found = self.records.begin.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def answers(self) -> FixedAnswers:
        """What it answered to its fixed prompts."""
        return FixedAnswers.of(self.folder, self.records.run)

    @property
    def smoothed_loss(self) -> str:
        """The first and the last smoothed training loss, "" before there is one."""
        loss = self.records.train.get("loss")
        found = ends(loss.line()) if loss is not None else None
        return f"{figure(found[0])} -> {figure(found[1])}" if found else ""

    @property
    def time(self) -> str:
        """How long it took up to now, and how fast it is."""
        facts = self.facts
        speed = f", {facts.tokens_per_s:,.0f} tokens/s" if facts.tokens_per_s else ""
        return duration(facts.seconds) + speed


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises ValueError where there is none."""
    records = Records(folder / METRICS_FILE)
    records.read()
    if not records.begin and not records.train and not records.held_out:
        raise ValueError(f"{folder} is no folder of a run: it has no {METRICS_FILE} in which a run begins")
    return Run(folder, records, facts_of(folder, records.run))


def escaped(text: object) -> str:
    """Text as HTML; what UTF-8 cannot write as escapes."""
    return html.escape(str(text).encode(errors="backslashreplace").decode())


def table(rows: Iterable[tuple[str, object]], form: str = "facts") -> str:
    """Rows of a label and a text."""
    inside = "".join(f"<tr><th>{escaped(label)}</th><td>{escaped(text)}</td></tr>" for label, text in rows)
    return f'<table class="{form}">{inside}</table>' if inside else ""


def wide_table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table with titles, which is moved sideways where the window is narrow."""
    head = "".join(f"<th>{escaped(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def block(text: str) -> str:
    """Text as it was written."""
    return f"<pre>{escaped(text)}</pre>"


def section(title: str, inside: str) -> str:
    """A part of the page; nothing where there is nothing in it."""
    return f"<h2>{escaped(title)}</h2>{inside}" if inside else ""


def page(title: str, inside: str, panels: list[dict[str, Any]], live: bool = False) -> str:
    """A whole document: style, program and data stand in it, and it asks for nothing else."""
    data = json.dumps(panels).replace("<", "\\u003c")
    style, program = ((HERE / name).read_text(encoding="ascii") for name in ("page.css", "page.js"))
    at = inside.index(CURVES)
    body = f'{inside[:at]}<script type="application/json" id="data">{data}</script>{inside[at:]}'
    return f"""<!doctype html>
<html lang="en"{' data-live="1"' if live else ""}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>{body}</main>
<noscript>The curves of this page are drawn by a script in it.</noscript>
<script>
{program}</script>
</body>
</html>
"""


CURVES = '<div class="grid" id="curves"></div>'


def run_page(run: Run, live: bool = False) -> str:
    """The page of one run."""
    facts = run.facts
    curves = panels_of(run.records)
    inside = [
        f"<h1>{escaped(run.name)}</h1>",
        f'<div class="dim" id="live"{written(facts)}>{escaped(state_line(run))}</div>',
        table(summary(run)),
        section("Next", "".join(map(block, facts.next))),
        f"<h2>Curves</h2>{'' if curves else '<p>Nothing is logged yet.</p>'}{CURVES}",
        section("Evaluation tasks", tasks_table(run.records.tasks)),
        section("Answers to fixed prompts", answers(run.answers)),
        section("Answers of the last rollout", rollout_table(run.folder)),
        section("Pairs still wrong", wrong_pairs(facts.wrong)),
        section("Notices and events", notices(run)),
        section("Plan", plan_table(facts.plan)),
        section("Data", block("\n".join(facts.data)) if facts.data else ""),
        section("How it was started", started(run)),
    ]
    return page(run.name, "".join(inside), curves, live)


def write_page(run: Run) -> Path:
    """Rewrite the page of a run at once, or not at all."""
    path = run.folder / PAGE
    with atomic_write(path) as file:
        file.write(run_page(run).encode())
    return path


def state_line(run: Run) -> str:
    """Where the run stands."""
    facts, done = run.facts, run.records.step
    if not facts.total:
        return f"step {done:,}"
    state = f"{LOST} (last sign of life: {facts.updated})" if facts.state == LOST else facts.state
    words = f"{state}: step {done:,} of {facts.total:,} ({min(1.0, done / facts.total):.0%})"
    if facts.state == RUNNING and done and facts.seconds:
        words += f", about {duration(facts.seconds / done * max(0, facts.total - done))} left"
    return f"{words}; this page: {facts.updated}" if facts.updated and facts.state != LOST else words


def written(facts: RunFacts) -> str:
    """When the page of a run that goes on was written, for the program in it, which says how long ago that is."""
    return f' data-written="{escaped(facts.updated)}"' if facts.state == RUNNING and facts.updated else ""


def summary(run: Run) -> Iterator[tuple[str, str]]:
    """The head of the page."""
    facts = run.facts
    yield from ((label, text) for label, text, *_ in facts.about)
    if facts.seconds:
        yield ("time" if facts.state == ENDED else "time so far"), run.time
    if run.smoothed_loss:
        yield "loss, smoothed", run.smoothed_loss
    yield from held_out_lines(run)
    for name, path, count in facts.files:
        yield str(name), f"{path} ({size(count)})"


def held_out_lines(run: Run) -> Iterator[tuple[str, str]]:
    """First, last and best of what rwkv-best is chosen by."""
    best = run.facts.held_out
    if not best:
        return
    name, column = str(best["name"]), run.records.held_out.get(str(best["name"]))
    if column is not None and len(values := column.line().values):
        yield f"held-out {name}", f"{figure(values[0])} -> {figure(values[-1])}"
    yield f"best held-out {name}", f"{figure(best['value'])} at step {best['step']:,} (rwkv-best)"


def tasks_table(tasks: Mapping[int, Mapping[str, float]]) -> str:
    """The figures of evaluation tasks before training and after it."""
    if not tasks:
        return ""
    steps = sorted(tasks)
    titles = ("task", "figure", *(f"step {step:,}" for step in steps))
    names = dict.fromkeys(name for found in tasks.values() for name in found)
    rows = [[*name.rsplit("/", 1), *(tasks[step].get(name) for step in steps)] for name in names]
    shown = [[cell if isinstance(cell, str) else "" if cell is None else figure(cell) for cell in row] for row in rows]
    return wide_table(titles, shown)


def answers(found: FixedAnswers) -> str:
    """Each prompt with its first answer and, beside it, a later one that can be chosen."""
    blocks = []
    for number, (prompt, given) in enumerate(found.by_prompt.items()):
        steps = list(given)
        word = f"answer{number}"
        chosen = "".join(
            f'<option value="{step}"{" selected" if step == steps[-1] else ""}>step {step}</option>' for step in steps
        )
        later = "".join(
            f'<pre data-{word}="{step}"{"" if step == steps[-1] else " hidden"}>{escaped(text)}</pre>'
            for step, text in given.items()
        )
        blocks.append(
            f'<div class="answers"><div class="prompt">{escaped(prompt)}</div>'
            f'<div><span class="dim">before: step {steps[0]}</span>{block(given[steps[0]])}</div>'
            f'<div><label class="dim">now: <select data-answers="{word}">{chosen}</select></label>{later}</div></div>'
        )
    return "".join(blocks)


def rollout_table(folder: Path) -> str:
    """What a policy answered last, with its rewards."""
    rows = rollout_answers(folder)
    titles = ("prompt", "answer", "reward")
    return wide_table(titles, ((row.get(title, "") for title in titles) for row in rows)) if rows else ""


def wrong_pairs(wrong: Mapping[str, Any]) -> str:
    """Held-out pairs whose rejected answer is ahead, the worst first."""
    pairs = wrong.get("pairs", [])
    if not wrong:
        return ""
    said = f"<p>{wrong['count']} of {wrong['of']} held-out pairs at step {wrong['step']}; the worst {len(pairs)}:</p>"
    if not pairs:
        return f"<p>None of {wrong['of']} held-out pairs at step {wrong['step']}.</p>"
    titles = ("prompt", "chosen", "reject", "margin")
    return said + wide_table(titles, ((pair[title] for title in titles) for pair in pairs))


def notices(run: Run) -> str:
    """Warnings, and where the run went on after a stop."""
    rows = [(known["time"], known["step"], known["text"]) for known in run.facts.notices]
    rows += [("", event.get("step", ""), "the run went on from here after a stop") for event in run.records.events]
    return wide_table(("time", "step", "what"), rows) if rows else ""


def plan_table(plan: list[dict[str, str]]) -> str:
    """What trains in which layers, and how fast."""
    return wide_table(plan[0], (row.values() for row in plan)) if plan else ""


def started(run: Run) -> str:
    """The command, versions and all settings."""
    facts, config = run.facts, run.folder / RUN_FILE
    about = [("begun", facts.begun or run.records.begin.get("time", "")), ("folder", facts.directory)]
    inside = (block(facts.command) if facts.command else "") + table(
        (label, text) for label, text in (*about, *facts.versions.items()) if text
    )
    if run.settings:
        inside += f"<details><summary>Settings that differ from their defaults</summary>{table(run.settings.items())}"
        inside += "</details>"
    if config.is_file():
        text = config.read_text(encoding="utf-8", errors="replace")
        inside += f"<details><summary>{RUN_FILE}, for --config</summary>{block(text)}</details>"
    return inside
