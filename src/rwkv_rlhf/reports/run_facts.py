"""What a page tells of a run beside its numbers: `report.json` in the folder, written again with the page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.run_lock import surely_ended
from rwkv_rlhf.files import read_json_object, write_json

FACTS = "report.json"
RUNNING, ENDED, STOPPED = "running", "ended", "stopped"
LOST = "stopped without an end"  # killed: it could say nothing of it, so it is never written into the file
MOST_NOTICES = 200


@dataclasses.dataclass
class RunFacts:
    """Everything is text or numbers as JSON has them.

    Attributes:
        run: id of the run, as in run.json. state: one of the words above.
        about: what the run is, in lines of (label, text): model, method, data, length, learning rate, memory.
        total: optimizer steps of the run. command, directory: what was typed, and where. begun: when, in ISO form.
        seconds: time at work up to now, over all starts. tokens_per_s: median of the last steps.
        versions: program, Python, PyTorch and the machine. data: lines about the files. plan: rows of the plan.
        notices: {"time", "step", "text"} of each warning. held_out: the figure that rwkv-best is chosen by.
        wrong: held-out pairs whose rejected answer is still ahead. files: what was saved, with bytes. next: commands.
    """

    run: str = ""
    state: str = RUNNING
    about: list[list[str]] = dataclasses.field(default_factory=list)
    total: int = 0
    command: str = ""
    directory: str = ""
    begun: str = ""
    updated: str = ""
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    data: list[str] = dataclasses.field(default_factory=list)
    plan: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    held_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrong: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: list[list[Any]] = dataclasses.field(default_factory=list)
    next: list[str] = dataclasses.field(default_factory=list)

    def notice(self, when: str, step: int, text: str) -> None:
        """Keep a warning, once, and no more than MOST_NOTICES of them."""
        if len(self.notices) < MOST_NOTICES and text not in [known["text"] for known in self.notices]:
            self.notices.append({"time": when, "step": step, "text": text})


def read_facts(folder: Path) -> RunFacts:
    """Those of a folder; of a run of an older program, or where the file is damaged, they are empty."""
    try:
        found = read_json_object(folder / FACTS)
    except ValueError:
        return RunFacts()
    known = {field.name: field.default for field in dataclasses.fields(RunFacts)}
    empty = RunFacts()
    kept = {name: value for name, value in found.items() if name in known and fits(value, getattr(empty, name))}
    return RunFacts(**kept)


def facts_of(folder: Path, run: str) -> RunFacts:
    """Those of the run with the id `run` ("" = of an older program, which gave none); empty where they are another's.

    Of a run that was killed they say so.
    """
    facts = read_facts(folder)
    if run and facts.run not in ("", run):
        return RunFacts()
    if facts.state == RUNNING and surely_ended(folder):
        facts.state = LOST
    return facts


def fits(value: Any, like: Any) -> bool:
    """Whether a value of the file has the type of the field."""
    return isinstance(value, int | float) if isinstance(like, float) else isinstance(value, type(like))


def write_facts(folder: Path, facts: RunFacts) -> None:
    """Atomic; raises ValueError when it cannot be written."""
    write_json(folder / FACTS, dataclasses.asdict(facts))
