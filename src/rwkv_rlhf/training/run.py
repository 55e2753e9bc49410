"""The rooms in the order that a run walks through them; train.py reads as the list of these."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkv_rlhf.checkpoints.adapter_files import write_factors
from rwkv_rlhf.checkpoints.loading import unused_tensors
from rwkv_rlhf.checkpoints.named_model import checkpoint_file
from rwkv_rlhf.checkpoints.resume_points import FOLDER, ResumePoint, ResumePoints
from rwkv_rlhf.checkpoints.run_folder import SAVED, RunFolder, trained_tensors
from rwkv_rlhf.checkpoints.sidecar import Sidecar, sidecar_of
from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.data.templates.jinja import template_process
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import MODEL_SUFFIXES, atomic_write, fingerprint
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.journal import Journal
from rwkv_rlhf.reports.page import Run
from rwkv_rlhf.reports.run_facts import RunFacts, read_facts
from rwkv_rlhf.reports.sample_table import SampleTable
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.scoring.teacher import open_teacher
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.config_file import RUN_FILE, config_text
from rwkv_rlhf.training.choices import as_typed, one_pass, settings_of, with_pass
from rwkv_rlhf.training.ending import end_lines, next_commands
from rwkv_rlhf.training.find_point import about_run
from rwkv_rlhf.training.fit import Around, fit
from rwkv_rlhf.training.fixed_prompts import FixedPrompt, FixedPrompts, prompts_of_data, prompts_of_file
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.length import schedule_of
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.optimizers import state_of
from rwkv_rlhf.training.overview import NO_ROOM, begin_facts, opening_lines, refuse_too_large
from rwkv_rlhf.training.recipe import passes, say_recipe
from rwkv_rlhf.training.resume import take_weights
from rwkv_rlhf.training.run_owner import begin_run
from rwkv_rlhf.training.start import Start, continues, numbered_from, resume_adapter

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_003  # ranks drop out by different numbers, and not by those of a run with the next seed


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
    for label, line in opening_lines(config, start):
        log.info("%s: %s", label, line)
    with open_journal(folder, point) as journal:
        return _train(config, typed, folder, start, settings, point, begun, journal)


def open_journal(folder: Path, point: ResumePoint | None) -> Journal:
    """What keeps the page; of a run that goes on, with what it knew. Only rank zero's is ever written."""
    return Journal(
        folder, read_facts(folder) if point is not None and point.project.resolve() == folder.resolve() else RunFacts()
    )


def _train(
    config: Config,
    typed: Config,
    folder: Path,
    start: Start,
    settings: dict[str, Any],
    point: ResumePoint | None,
    begun: str,
    journal: Journal,
) -> bool:
    teacher = open_teacher(config, start.sizes.vocab_size, start.model.ways)
    inputs = Inputs(config, start, folder)
    prompts = prompts_of_file(config, inputs.tokenizer) if config.sample_prompts else []
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
    room = NO_ROOM
    with Harmless("the page does not say what this run is")():
        room = begin_facts(journal.facts, config, start, inputs, steps)
    ranks.agreed(lambda: refuse_too_large(config, room))
    if config.compile:
        start.model.compile_blocks()
    module = TrainingModule(start.model, start.plan, config, schedule_of(config, steps), folder, teacher, rollouts)
    base = start.base_hash
    name = ranks.broadcast_from_zero(lambda: begin_run(folder, settings, settings_of(config), point, base))
    sidecar = dataclasses.replace(run_sidecar(config, folder, start), run=name, begun=begun)
    run = run_folder(config, folder, start, sidecar)
    if ranks.is_rank_zero():
        with Harmless(f"{RUN_FILE} is not written")(), atomic_write(folder / RUN_FILE) as file:
            file.write(config_text(as_typed(typed)).encode())
    journal.facts.run, journal.facts.begun = name, begun
    initial = (sidecar.initial_file, sidecar.initial_sha256)
    products = start.model.ways.as_json()
    identity = about_run(settings, typed.epoch_count, start.path.name, start.hash, initial, begun, products)
    points = ResumePoints(folder / FOLDER, identity, point.path if point else None)
    if held_out is not None and not prompts:
        prompts = data_prompts(inputs, steps)
    around = Around(
        held_out,
        lambda: inputs.wrong,
        FixedPrompts(prompts, inputs.sampler, folder, name) if prompts else None,
        journal if ranks.is_rank_zero() else None,
        inputs.tasks(),
        one_pass(steps).steps,
    )
    stopped = fit(module, steps, config, run, settings_of(config), around, points, point)
    if ranks.is_rank_zero() and not stopped:
        with Harmless("the end of the run is not told")():
            say_end(config, run, start, journal, passes(config, steps))
    return stopped


def data_prompts(inputs: Inputs, steps: Steps | MixedSteps | PromptSteps) -> list[FixedPrompt]:
    """Three prompts of the data, where something is held out; the first ones of that, if it was split off.

    Losses on prompts keep answers of their own rollouts, and a reward model writes none.
    """
    c, found = inputs.config, []
    if c.loss_facts.predicts and c.loss_facts.data != "prompts":
        with Harmless("no prompts of the data are answered")():
            found = prompts_of_data(inputs.split_off or steps.examples, c, inputs.tokenizer)
    return found


def say_end(config: Config, run: RunFolder, start: Start, journal: Journal, often: float) -> None:
    """The last lines on the screen, and the commands on the page too."""
    whole = start.report.layout.trained >= {name for name, _ in start.model.named_parameters()}
    journal.facts.next = next_commands(config, run.folder, start.path, whole)
    journal.write()
    for line in end_lines(Run(run.folder, journal.records, journal.facts), often):
        log.info("%s", line)


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
