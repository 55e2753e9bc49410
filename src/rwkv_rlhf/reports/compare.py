"""Several runs on one page: the settings that differ, their figures, their curves over one another, their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.reports.page import CURVES, Run, block, escaped, page, section, wide_table
from rwkv_rlhf.reports.panels import compared_panels
from rwkv_rlhf.reports.words import duration, figure

OF_ONE_RUN = ("proj_dir",)  # settings in which runs differ anyway


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, or where two are called alike, the whole path."""
    plain = [run.name for run in runs]
    return [name if plain.count(name) == 1 else str(run.folder) for name, run in zip(plain, runs)]


def differing(runs: Sequence[Run]) -> Iterator[list[str]]:
    """[setting, value in each run] of those that are not the same in all; "" where it has its default."""
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name, "") for run in runs]
        if name not in OF_ONE_RUN and any(value != values[0] for value in values):
            yield [name, *map(str, values)]


def figures(runs: Sequence[Run]) -> Iterator[list[str]]:
    """[label, text of each run]."""

    def best(run: Run) -> str:
        known = run.facts.held_out
        return f"{known['name']} {figure(known['value'])} at step {known['step']:,}" if known else ""

    yield ["state", *(run.facts.state if run.facts.total else "" for run in runs)]
    yield ["steps", *(f"{run.records.step:,}" for run in runs)]
    yield ["time", *(duration(run.facts.seconds) if run.facts.seconds else "" for run in runs)]
    yield ["tokens/s", *(f"{run.facts.tokens_per_s:,.0f}" if run.facts.tokens_per_s else "" for run in runs)]
    yield ["loss, smoothed", *(run.smoothed_loss for run in runs)]
    yield ["best held-out figure", *map(best, runs)]
    measured = [run.records.tasks[max(run.records.tasks)] if run.records.tasks else {} for run in runs]
    for name in dict.fromkeys(name for found in measured for name in found):
        yield [name, *(figure(found[name]) if name in found else "" for found in measured)]


def last_answers(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The last answer of each run to the prompts that several of them were asked."""
    found = [run.answers.by_prompt for run in runs]
    blocks = []
    for prompt in dict.fromkeys(prompt for given in found for prompt in given):
        asked = [(name, given[prompt]) for name, given in zip(names, found) if prompt in given]
        if len(asked) < 2:
            continue
        cells = "".join(
            f'<div><span class="dim">{escaped(name)}, step {max(given)}</span>{block(given[max(given)])}</div>'
            for name, given in asked
        )
        blocks.append(f'<div class="answers"><div class="prompt">{escaped(prompt)}</div>{cells}</div>')
    return "".join(blocks)


def compare_page(runs: Sequence[Run]) -> str:
    """The page."""
    names = names_of(runs)
    different = list(differing(runs))
    same = "<p>None: the runs have the same settings.</p>"
    curves = compared_panels(dict(zip(names, (run.records for run in runs))))
    title = ", ".join(names)
    inside = [
        f"<h1>{escaped(title)}</h1>",
        section("Figures", wide_table(["", *names], figures(runs))),
        section("Settings that differ", wide_table(["", *names], different) if different else same),
        f"<h2>Curves</h2>{CURVES}",
        section("Last answers to fixed prompts", last_answers(runs, names)),
    ]
    return page(title, "".join(inside), curves)


def write_compared(runs: Sequence[Run], path: Path) -> None:
    """The page as a file, at once or not at all."""
    text = compare_page(runs)
    with atomic_write(path) as file:
        file.write(text.encode())
