"""samples.jsonl: what a model answered, for people who want to see what a curve means: to the prompts of a rollout,
with rewards, and to a few fixed prompts at each validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_rlhf.reports.metrics import append_json

SAMPLES = "samples.jsonl"
FIRST = '{"rollout"'  # how lines of a rollout begin
ANSWERED = '{"step"'  # and those of the fixed prompts
KEPT = 30  # answers to a fixed prompt on a page


class FixedAnswers(NamedTuple):
    """Of each fixed prompt, what a run answered: optimizer step -> text."""

    by_prompt: dict[str, dict[int, str]]

    @classmethod
    def of(cls, folder: Path, run: str) -> FixedAnswers:
        """Those of one run of a folder, of many validations some: the first, the last and others between."""
        found: dict[str, dict[int, str]] = {}
        for line in sample_lines(folder, ANSWERED):
            if line.get("run") == run and isinstance(line.get("step"), int):
                found.setdefault(str(line.get("prompt")), {})[line["step"]] = str(line.get("answer"))
        return cls({prompt: some(given) for prompt, given in found.items()})


def some(given: dict[int, str]) -> dict[int, str]:
    """At most KEPT of the answers, in the order of their steps."""
    steps = sorted(given)
    kept = {round(at * (len(steps) - 1) / (KEPT - 1)) for at in range(KEPT)}
    return {step: given[step] for at, step in enumerate(steps) if at in kept}


def keep_answer(folder: Path, run: str, step: int, prompt: str, answer: str) -> None:
    """What was answered to a fixed prompt at a validation."""
    append_json(folder / SAMPLES, {"step": step, "run": run, "prompt": prompt, "answer": answer})


def sample_lines(folder: Path, first: str) -> Iterator[dict[str, Any]]:
    """The lines of samples.jsonl that begin with `first`, without those that were never finished."""
    path = folder / SAMPLES
    for line in path.read_bytes().splitlines() if path.exists() else ():
        if line.startswith(first.encode()):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def rollout_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of the last rollout that was kept."""
    found = list(sample_lines(folder, FIRST))
    return [line for line in found if line.get("rollout") == found[-1].get("rollout")]
