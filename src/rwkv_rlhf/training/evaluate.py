"""`--eval_only 1`: scores of held-out data and nothing else. Here is no Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rwkv_rlhf.checkpoints.sidecar import read_sidecar
from rwkv_rlhf.data.templates.jinja import template_process
from rwkv_rlhf.reports.metrics import append_json
from rwkv_rlhf.scoring.finite import refuse_not_finite
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.start import Start, resume_adapter


def evaluate(config: Config, folder: Path, start: Start) -> dict[str, Any]:
    """--eval_only 1: score --val_file and append the result to metrics.jsonl."""
    trained = read_sidecar(config.load_adapter) if config.load_adapter else None
    if trained is not None and trained.begun:
        template_process().now = trained.begun
    inputs = Inputs(config, start, folder)
    compared = bool(config.load_adapter or config.reference_model)
    score = inputs.held_out(reference=compared)  # the reference is the model without its adapter
    assert score is not None, "--eval_only without held-out data"
    if config.load_adapter:
        resume_adapter(config, start)
    result = {"event": "eval"} | score()
    figures = torch.tensor([value for value in result.values() if isinstance(value, float)])
    refuse_not_finite(f"a score of {config.val_file}", figures, start.model)
    append_json(folder / "metrics.jsonl", result)
    return result
