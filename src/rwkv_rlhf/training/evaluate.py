"""`--eval_only 1`: scores of held-out data and nothing else. Here is no Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rwkv_rlhf.checkpoints.sidecar import read_sidecar
from rwkv_rlhf.data.templates.jinja import template_process
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.reports.metrics import append_json
from rwkv_rlhf.scoring.finite import refuse_not_finite
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.held_out_lines import held_out_line, tasks_lines
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.start import Start, resume_adapter


def evaluate(config: Config, folder: Path, start: Start) -> dict[str, Any]:
    """--eval_only 1: score --val_file and measure --eval_tasks, and append what came out to metrics.jsonl.

    Gives it in one object, the tasks' figures under "tasks".
    """
    trained = read_sidecar(config.load_adapter) if config.load_adapter else None
    if trained is not None and trained.begun:
        template_process().now = trained.begun
    inputs = Inputs(config, start, folder)
    compared = bool(config.load_adapter or config.reference_model)
    score = inputs.held_out(reference=compared)  # the reference is the model without its adapter
    if config.load_adapter:
        resume_adapter(config, start)
    result: dict[str, Any] = {"event": "eval"} | (score() if score is not None else {})
    figures = torch.tensor([value for value in result.values() if isinstance(value, float)])
    refuse_not_finite(f"a score of {config.val_file}", figures, start.model)
    if (measured := inputs.tasks()) is not None:
        result["tasks"] = measured()
    if ranks.is_rank_zero():
        append_json(folder / "metrics.jsonl", result)
    return result


def evaluation_lines(config: Config, result: dict[str, Any]) -> Iterator[str]:
    """What `evaluate` found, in sentences."""
    of = next((f"{result[name]:,} {name}" for name in ("pairs", "answers", "prompts", "tokens") if name in result), "")
    if of:
        yield f"{held_out_line(result, None)} ({of} of {config.val_file})"
    yield from tasks_lines(result.get("tasks", {}))
