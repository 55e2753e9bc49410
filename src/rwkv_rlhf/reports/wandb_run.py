"""A run at Weights & Biases: opened before anything slow, offline where nobody is logged in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rwkv_rlhf.reports.logger import TRAINING, numbers

log = logging.getLogger(__name__)


def _plain(value: Any) -> Any:
    """A path that is not UTF-8 as text that is."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def open_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The run that was opened before in this process, or a new one, with its files in `folder`.

    Where it cannot be opened online it is kept offline, which is said. Raises ValueError when the package is missing
    or refuses the project's name.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"{{wandb}} {project} needs the package wandb: pip install wandb") from error
    if wandb.run is not None:
        return wandb.run
    shown = {name: _plain(value) for name, value in settings.items()}
    about = {"project": project, "dir": str(folder), "config": shown, "name": _plain(folder.name)}
    try:
        return wandb.init(**about)
    except Exception as refused:  # no login, no network, a name that is not legal: wandb has a class for each
        try:
            run = wandb.init(**about, mode="offline")
        except Exception as error:
            raise ValueError(f"{{wandb}} {project}: {error}") from error
        log.warning("--wandb %s: %s; the run is kept offline in %s (wandb sync sends it)", project, refused, run.dir)
        return run


class WandbLog:
    """A run at Weights & Biases: steps under the plain names, held-out figures as held_out/NAME.

    Only with it does anything leave the machine.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        self.run = open_wandb(project, folder, settings)

    def add(self, record: dict[str, Any]) -> None:
        """Its figures."""
        told = numbers(record)
        if record["event"] != TRAINING:
            told = {f"held_out/{name}": value for name, value in told.items()}
        self.run.log(told, step=record["step"])

    def close(self) -> None:
        """Close the run there too."""
        self.run.finish()
