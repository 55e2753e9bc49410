"""What a person is told when a run has ended: what came out, where it lies, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.run_folder import SAVED
from rwkv_rlhf.files import bytes_of
from rwkv_rlhf.reports.page import PAGE, Run
from rwkv_rlhf.reports.words import command, figure, pasted, size
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.counted import counted


def saved_files(folder: Path) -> list[list[Any]]:
    """[name, path, bytes] of what a run saved: the best, the last and the newest numbered checkpoint."""
    found = {match[1]: path for path in folder.iterdir() if (match := SAVED.match(path.name))}
    numbers = [int(name) for name in found if name.isdigit()]
    names = [name for name in ("best", "final", "last") if name in found]
    names += [str(number) for number in sorted(numbers)[-1:]]
    return [[found[name].name, str(found[name]), bytes_of(found[name])] for name in names]


def next_commands(config: Config, folder: Path, base: Path, whole: bool) -> list[str]:
    """Merge and chat, to paste; a whole model needs no merging, and a reward model does not chat."""
    found = {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if SAVED.match(path.name)}
    trained = found.get("rwkv-best") or found.get("rwkv-final")
    if trained is None:
        return []
    told = config.template not in ("world", "mixed")
    template = ["--template", config.template] if told else []
    model, lines = trained, []
    if not whole:
        model = folder / "merged.pth"
        words = ["--base_model", str(base), "--lora_checkpoint", str(trained), "--output", str(model)]
        lines.append(f"{command('merge')} {pasted(words)}")
    if config.loss_facts.predicts:
        lines.append(f"{command('chat')} {pasted(['--load_model', str(model), *template])}")
    return lines


def end_lines(run: Run, passes: float) -> Iterator[str]:
    """The summary, from what the page knows."""
    facts = run.facts
    yield f"done: {counted(run.records.step, 'step')}, {counted(passes, 'pass', 'passes')} in {run.time}"
    if run.smoothed_loss:
        yield f"loss (smoothed): {run.smoothed_loss}"
    if best := facts.held_out:
        yield f"best held-out {best['name']}: {figure(best['value'])} at step {best['step']:,}"
    for _, path, count in facts.files:
        yield f"saved: {path} ({size(count)})"
    if (run.folder / PAGE).exists():
        yield f"page: {run.folder / PAGE}"
    if facts.next:
        yield "next:"
        yield from (f"  {line}" for line in facts.next)
