"""Whose a project folder is: what a run leaves in it belongs to one run, which `run.json` names with its settings."""

from __future__ import annotations

import datetime
import logging
import re
import secrets
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.named_model import checkpoint_file
from rwkv_rlhf.checkpoints.resume_points import FOLDER, ResumePoint, points_in
from rwkv_rlhf.checkpoints.run_folder import INITIAL, SAVED
from rwkv_rlhf.files import file_hash, read_json_object, write_json
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.metrics import METRICS, append_json
from rwkv_rlhf.reports.run_facts import FACTS
from rwkv_rlhf.reports.samples import SAMPLES
from rwkv_rlhf.settings.config import PROGRAM_VERSION, Config
from rwkv_rlhf.settings.config_file import RUN_FILE
from rwkv_rlhf.training.run_identity import differences
from rwkv_rlhf.training.start import continues

log = logging.getLogger(__name__)

RUN = "run.json"
# all that a run leaves, beside scores that any run of the model may use
LEFT = re.compile(
    r"rwkv-(\d+|final|best|last)(-state)?(-[0-9a-f]{8}-\d{5}-of-\d{5})?\.(pth|safetensors|json|safetensors\.index\.json)"
    r"|pissa-init-.*|bad-step-.*\.pth|metrics\.(jsonl|csv)|tensorboard|train_log\.txt|curves\.png|report\.html|compare\.html"
    rf"|{'|'.join(map(re.escape, (RUN, RUN_FILE, SAMPLES, FACTS)))}|{FOLDER}"
)
SHOWN = 3  # names in a sentence


def results_in(folder: Path) -> list[str]:
    """Names of checkpoints, and of the resume folder if it holds a point: what another run would write over."""
    found = sorted(entry.name for entry in folder.iterdir() if SAVED.match(entry.name))
    return [*found, FOLDER] if points_in(folder / FOLDER) else found


def goes_on(config: Config, folder: Path, point: ResumePoint | None) -> bool:
    """Whether the run begins from what is in the folder: --resume, --load_model 0, or one of its adapters."""
    if point is not None and point.project.resolve() == folder.resolve():
        return True
    adapter = bool(config.load_adapter) and Path(config.load_adapter).resolve().parent == folder.resolve()
    return continues(config) or adapter


def another_run(config: Config, folder: Path, settings: dict[str, Any]) -> str:
    """What sets the run whose results are in the folder apart from this one, with the identity `settings`; "" when it
    is the same, or when there are none."""
    found = results_in(folder)
    if not found:
        return ""
    names = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    try:
        about = read_json_object(folder / RUN)
        wrong, _ = differences(about["settings"], settings)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{names} of another run (no {RUN} says which)"
    if not wrong and about.get("base") and file_hash(config.load_model) != about["base"]:
        wrong = ["{load_model} is another model"]
    return f"{names} of a run with other settings ({'; '.join(wrong[:SHOWN])})" if wrong else ""


def refuse_another_runs_folder(config: Config, folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError when a run with `settings` would mix its results with those of another one.

    With --archive 1 those are moved away, with --force 1 or in a dry run it is only said.
    """
    if config.archive and not config.dry_run and results_in(folder):
        archive(config, folder)
        return
    other = another_run(config, folder, settings)
    if not other:
        return
    if config.dry_run:
        log.warning("%s holds %s: this run will need another folder, --archive 1 or --force 1", folder, other)
        return
    if config.force:
        log.warning("--force 1: %s holds %s, which this run writes over or leaves beside its own", folder, other)
        return
    raise ValueError(
        f"{{proj_dir}} {folder} holds {other}: give another folder, {{archive}} 1 (moves them to {folder}/old-DATE) or "
        "{force} 1 (writes over them); {resume} auto goes on with that run, if its settings are given again"
    )


def refuse_another_start(config: Config, folder: Path) -> None:
    """Raises ValueError when --train_stage 1 would replace the model that checkpoints in the folder began from."""
    found = results_in(folder)
    if found and (folder / INITIAL).exists() and not config.force:
        raise ValueError(
            f"{{proj_dir}} {folder} holds {INITIAL} and {found[0]}, which began from it: give another folder, or "
            "{force} 1 to write over it"
        )


def archive(config: Config, folder: Path) -> None:
    """Move what a run left into `old-DATE` in the folder. Raises ValueError when this run needs some of it."""
    moved = [entry for entry in folder.iterdir() if LEFT.fullmatch(entry.name)]
    needed = {
        "load_model": config.load_model,
        "load_cold_adapter": config.load_cold_adapter,
        "load_adapter_pissa_init": config.load_adapter_pissa_init,
        "reference_model": config.reference_model,
        "reward_model": str(checkpoint_file(config.reward_model)) if config.reward_model else "",
        "teacher_model": config.teacher_model,
    }
    for name, path in needed.items():
        if path and Path(path).resolve() in {entry.resolve() for entry in moved}:
            raise ValueError(f"{{{name}}} {path} is among what {{archive}} 1 would move: copy it elsewhere first")
    place = folder / f"old-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}"
    place.mkdir()
    for entry in moved:
        entry.rename(place / entry.name)
    log.info("the earlier run is in %s", place)


def begin_run(
    folder: Path, settings: dict[str, Any], shown: dict[str, Any], point: ResumePoint | None, base: str = ""
) -> str:
    """Make the folder that of this run, and return the run's id; a run that goes on from a `point` in it keeps its own.

    `settings` are its identity, `shown` what differs from the defaults, for people, `base` the hash of its model.
    """
    if point is not None and point.project.resolve() == folder.resolve():
        try:
            return str(read_json_object(folder / RUN)["run"])
        except (ValueError, KeyError):
            pass  # of an older program
    run, begun = secrets.token_hex(4), datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"run": run, "begun": begun, "program_version": PROGRAM_VERSION, "base": base, "settings": settings}
    write_json(folder / RUN, about)
    with Harmless(f"{METRICS} lacks the begin of the run")():
        append_json(folder / METRICS, {"event": "begin", "run": run, "time": begun, "settings": shown})
    return run
