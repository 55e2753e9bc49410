"""The resume point that a run goes on from, and what every point says of its run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.resume_points import FOLDER, ResumePoint, explicit_point, last_point, points_in
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.run_identity import refuse_another_run
from rwkv_rlhf.training.start import continues

log = logging.getLogger(__name__)

NEVER = -1  # --resume_every


def find_point(config: Config, folder: Path, settings: dict[str, Any]) -> ResumePoint | None:
    """The point that --resume asks for; None without --resume, or with `auto` without any point.

    `settings` are the identity of this run. Raises ValueError when the points are damaged or belong to another run.
    """
    if not config.resume:
        if points_in(folder / FOLDER) and config.resume_every != NEVER:
            log.warning(
                "%s holds a resume point of an earlier run. This run starts from the beginning and will replace it; to "
                "continue the earlier run instead, add --resume auto",
                folder / FOLDER,
            )
        return None
    point = last_point(folder / FOLDER) if config.resume == "auto" else explicit_point(Path(config.resume))
    if point is None:
        begin = "from its newest checkpoint" if continues(config) else "from the beginning"
        log.info("--resume auto: %s holds no resume point, so the run starts %s", folder, begin)
        return None
    if point.about["world"] != ranks.world_size():
        raise ValueError(
            f"{point.path} was written by {point.about['world']} processes, {ranks.world_size()} are running: resume "
            "with as many"
        )
    rounds = refuse_another_run(point.about["settings"], settings, point.path)
    if rounds:
        log.warning(
            "%s changed since %s: the rest of the run will not be the same bit for bit", ", ".join(rounds), point.path
        )
    if point.about["epoch_count"] != config.epoch_count and config.lr_schedule != "constant":
        log.warning(
            "--epoch_count was %d, is %d: the learning rates of the rest are those of the new length",
            *(point.about["epoch_count"], config.epoch_count),
        )
    return point


def about_run(
    settings: dict[str, Any],
    epoch_count: int,
    base: str,
    model_hash: str,
    initial: tuple[str, str],
    begun: str,
    products: dict[str, list[str]],
) -> dict[str, Any]:
    """What every point of a run says of it: identity, the base file's name and hash, PiSSA's factors (name, hash), when
    it was first started, and how a CPU multiplies (`Ways.as_json`)."""
    return {
        "settings": settings,
        "epoch_count": epoch_count,
        "base": base,
        "model": model_hash,
        "initial": list(initial),
        "begun": begun,
        "products": products,
    }
