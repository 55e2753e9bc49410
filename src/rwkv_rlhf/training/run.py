"""The rooms in the order that a run walks through them; train.py reads as the list of these."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv_rlhf.checkpoints.adapter_files import write_factors
from rwkv_rlhf.checkpoints.loading import unused_tensors
from rwkv_rlhf.checkpoints.named_model import checkpoint_file
from rwkv_rlhf.checkpoints.resume_points import FOLDER, ResumePoint, ResumePoints
from rwkv_rlhf.checkpoints.run_folder import SAVED, RunFolder, trained_tensors
from rwkv_rlhf.checkpoints.sidecar import Sidecar, read_sidecar, sidecar_of
from rwkv_rlhf.data.templates.jinja import template_process
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import MODEL_SUFFIXES, atomic_write, fingerprint
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.metrics import append_json
from rwkv_rlhf.reports.samples import SampleTable
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.scoring.finite import refuse_not_finite
from rwkv_rlhf.scoring.teacher import open_teacher
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.config_file import RUN_FILE, config_text
from rwkv_rlhf.training.choices import as_typed, with_pass
from rwkv_rlhf.training.fit import fit, schedule_of
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.optimizers import state_of
from rwkv_rlhf.training.recipe import say_recipe
from rwkv_rlhf.training.resume import about_run, take_weights
from rwkv_rlhf.training.run_owner import begin_run
from rwkv_rlhf.training.start import Start, continues, numbered_from, resume_adapter

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_003  # ranks drop out by different numbers, and not by those of a run with the next seed


def settings_of(config: Config) -> dict[str, object]:
    """Every setting that differs from its default, for logs."""
    fields = (field for field in dataclasses.fields(config) if field.name != "given")
    return {field.name: value for field in fields if (value := getattr(config, field.name)) != field.default}


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


def train(
    config: Config, folder: Path, start: Start, settings: dict[str, Any], point: ResumePoint | None = None
) -> bool:
    """Train, from `point` on if there is one; True when Ctrl+C stopped it. `settings` are the run's identity.

    Reference scores are taken before an adapter or a point changes the model. Raises ValueError when a save would
    overwrite a file that the run begins from.
    """
    typed, config = config, numbered_from(config, start.path)
    refuse_overwriting(config, folder, start)
    pl.seed_everything(config.seed + SEEDS_APART * ranks.rank(), verbose=False)  # dropout
    if config.num_nodes > 1:
        ranks.check_same("--load_model", fingerprint(start.path))
    begun = template_process().now = first_start(point)
    teacher = open_teacher(config, start.sizes.vocab_size)
    inputs = Inputs(config, start, folder)
    steps = inputs.training()
    config = inputs.config = with_pass(config, steps)
    ranks.check_same("number of examples", len(steps.examples))
    held_out = inputs.held_out(reference=True)
    rollouts = None
    if isinstance(steps, PromptSteps):
        start.model.eval()  # a dropout would set the policy that learns apart from the one that samples
        rollouts = inputs.rollouts(steps)
        rollouts.listeners.append(SampleTable(folder, config.samples_every))
    if point is not None:
        take_weights(start.model, point, start.hash)
    elif config.load_adapter:
        resume_adapter(config, start)
    for line in (*start.report.lines(), state_of(config.optim, start.model).line()):
        log.info(line)
    say_recipe(config, start.plan, start.sizes, start.report.trained, steps)
    module = TrainingModule(start.model, start.plan, config, schedule_of(config, steps), folder, teacher, rollouts)
    base = start.base_hash
    name = ranks.broadcast_from_zero(lambda: begin_run(folder, settings, settings_of(config), point, base))
    sidecar = dataclasses.replace(run_sidecar(config, folder, start), run=name, begun=begun)
    run = run_folder(config, folder, start, sidecar)
    if ranks.is_rank_zero():
        with Harmless(f"{RUN_FILE} is not written")(), atomic_write(folder / RUN_FILE) as file:
            file.write(config_text(as_typed(typed)).encode())
    initial = (sidecar.initial_file, sidecar.initial_sha256)
    about = about_run(settings, typed.epoch_count, start.path.name, start.hash, initial, begun)
    points = ResumePoints(folder / FOLDER, about, point.path if point else None)
    return fit(module, steps, config, run, settings_of(config), held_out, points, point)


def first_start(point: ResumePoint | None) -> str:
    """When the run was first started, in ISO form, the same for all ranks: chat templates may write the date."""
    known = point.about.get("begun", "") if point else ""
    begun: str = ranks.broadcast_from_zero(lambda: known or this_second())
    return begun


def this_second() -> str:
    """The time, in ISO form."""
    return datetime.now().isoformat(timespec="seconds")


def refuse_overwriting(config: Config, folder: Path, start: Start) -> None:
    """Raises ValueError when a save of this run would take the place of a file that it, or its adapters, need later."""
    begin, end = config.epoch_begin, config.epoch_begin + config.epoch_count
    needed: dict[str, str | Path | None] = {
        "--load_model": None if continues(config) else start.path,
        "--load_cold_adapter": start.cold,
        "--load_adapter": config.load_adapter if config.resume else "",  # which is asked for again
        "--reference_model": config.reference_model,
        "--teacher_model": config.teacher_model,
        "--reward_model": checkpoint_file(config.reward_model) if config.reward_model else "",
    }
    for flag, path in needed.items():
        found = SAVED.match(Path(path).name) if path else None
        if not path or not found or Path(path).resolve().parent != folder.resolve():
            continue
        written = flag == "--load_model" or not found[1].isdigit() or begin <= int(found[1]) < end
        if written:
            raise ValueError(
                f"{flag} {path} is in --proj_dir {folder}, and this run would overwrite it: give another folder, or "
                "move the file"
            )


def run_sidecar(config: Config, folder: Path, start: Start) -> Sidecar:
    """What this run's checkpoints need beside them. Writes PiSSA's initial factors."""
    sidecar = sidecar_of(start.sizes.version, start.report.layout, start.plan, start.path, start.base_hash)
    name, sha256 = ranks.broadcast_from_zero(lambda: write_factors(start.model, folder, factors_suffix(config)))
    return dataclasses.replace(
        sidecar,
        initial_file=name,
        initial_sha256=sha256,
        cold_file=str(start.cold.resolve()) if start.cold else "",
        cold_sha256=start.cold_hash,
        template=config.template,
    )


def factors_suffix(config: Config) -> str:
    """Of PiSSA's initial factors, which are never in shards."""
    return ".pth" if config.save_format == "pth" else ".safetensors"


def run_folder(config: Config, folder: Path, start: Start, sidecar: Sidecar) -> RunFolder:
    """Where this run's checkpoints go, each with the sidecar that merge.py reads."""
    whole = start.report.layout.trained >= {name for name, _ in start.model.named_parameters()}
    unused = unused_tensors(start.model, start.read()) if whole else {}
    return RunFolder(
        folder,
        lambda: trained_tensors(start.model, start.report.dtypes, config.save_dtype) | unused,
        sidecar,
        suffix=MODEL_SUFFIXES[config.save_format],
        keep=config.keep,
        states=bool(config.state_output_mode),
    )
