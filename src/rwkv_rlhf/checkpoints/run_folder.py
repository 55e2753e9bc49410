"""The project folder of a run: checkpoints with sidecars, logs, curves. Every write is atomic or an append.

A checkpoint holds what trains under the tradition's names: adapters and small tensors float32, whole matrices in the
base file's dtype. `rwkv-{n}.pth` counts mini-epochs, `rwkv-final`, `rwkv-last` (Ctrl+C) and `rwkv-best` say the rest.
State tuning adds `rwkv-{n}-state.pth`, the learnt states alone. PiSSA's initial factors are in a file of their own.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_rlhf.checkpoints.loading import checkpoint_tensors
from rwkv_rlhf.checkpoints.shards import remove_old_shards
from rwkv_rlhf.checkpoints.sidecar import Sidecar, check_whole, read_sidecar, sidecar_path, write_checkpoint
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.files import MODEL_SUFFIXES, SHARDS_INDEX
from rwkv_rlhf.plan import is_state

log = logging.getLogger(__name__)

_SUFFIX = "|".join(map(re.escape, MODEL_SUFFIXES.values()))
INITIAL = "rwkv-init.pth"  # what --train_stage 1 writes
NUMBERED = re.compile(rf"^rwkv-(\d+)({_SUFFIX})$")
SAVED = re.compile(rf"^rwkv-(\d+|final|best|last)({_SUFFIX})$")  # the names that a run writes
WHOLE_MATRIX = (".weight",)  # saved in the base's dtype unless --save_dtype fp32
NORMS = (".ln0.", ".ln1.", ".ln2.", ".ln_x.", "ln_out.")


def open_folder(path: str) -> Path:
    """Make the project folder and prove that it can be written. Raises ValueError in one sentence if not."""
    folder = Path(path)
    probe = folder / f".writable-{os.getpid()}-{os.urandom(4).hex()}"  # every rank makes one
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--proj_dir {path} cannot be written: {error.strerror or error}") from error
    return folder


def newest_checkpoint(folder: Path) -> Path:
    """The numbered checkpoint with the largest number, else rwkv-init.pth.

    A damaged one is passed over with a warning. Raises ValueError when there is none left.
    """
    numbered = {int(m[1]): entry for entry in folder.iterdir() if (m := NUMBERED.match(entry.name))}
    for number in sorted(numbered, reverse=True):
        try:
            check_whole(read_sidecar(numbered[number]), numbered[number])
            return numbered[number]
        except ValueError as damage:
            log.warning("%s: the one before it is used", damage)
    initial = folder / INITIAL
    if not initial.exists():
        raise ValueError(
            f"--load_model 0 found neither rwkv-<n>.pth nor {INITIAL} in {folder}: run --train_stage 1 first"
        )
    return initial


def trained_tensors(model: nn.Module, dtypes: Mapping[str, torch.dtype], save_dtype: str) -> dict[str, Tensor]:
    """What a checkpoint holds, on the CPU, in its dtype on disk; `dtypes` are those of the base file.

    All ranks call this, as a tensor may be spread over them: each in turn is gathered for rank zero.
    """
    tensors = {}
    for name, parameter in checkpoint_tensors(model).items():
        whole = name.endswith(WHOLE_MATRIX) and not any(norm in f".{name}" for norm in NORMS)
        dtype = dtypes.get(name, torch.float32) if whole and save_dtype == "base" else torch.float32
        with ranks.full_tensor(parameter) as tensor:
            if ranks.is_rank_zero():
                tensors[name] = tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
    return tensors


class RunFolder:
    """Writes checkpoints of one run, each with its sidecar; with `states` learnt states also to a file of their own."""

    def __init__(
        self,
        folder: Path,
        tensors: Callable[[], dict[str, Tensor]],
        sidecar: Sidecar,
        suffix: str = ".pth",
        keep: int = 0,
        states: bool = False,
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self.sidecar = sidecar
        self.suffix = suffix
        self.keep = keep
        self.states = states
        self._numbered: list[Path] = []

    @property
    def numbered(self) -> list[str]:
        """Names of this run's numbered checkpoints, oldest first."""
        return [path.name for path in self._numbered]

    @numbered.setter
    def numbered(self, names: list[str]) -> None:
        self._numbered = [self.folder / name for name in names]

    def save(self, name: str, why: str = "") -> Path:
        """Write `rwkv-{name}` and its sidecar; returns the checkpoint's path. Raises ValueError when it cannot.

        `why` is said with it.

        Every rank calls this, as all of them may hold parts of the tensors; rank zero writes.
        """
        path = self.folder / f"rwkv-{name}{self.suffix}"
        heartbeat(f"saving {path.name}")
        tensors = self.tensors()
        if not ranks.is_rank_zero():
            return path
        learnt = {name: tensor for name, tensor in tensors.items() if self.states and is_state(name)}
        if learnt:
            write_tensors(learnt, self._state_path(path))
        write_checkpoint(tensors, self.sidecar, path)
        log.info("saved %s%s", path, f" ({why})" if why else "")
        return path

    def _state_path(self, path: Path) -> Path:
        return path.with_name(f"{path.name.removesuffix(self.suffix)}-state{self.suffix}")

    def save_numbered(self, number: int) -> Path:
        """Write `rwkv-{number}` and remove the oldest of this run beyond --keep."""
        path = self.save(str(number))
        self._numbered.append(path)
        while 0 < self.keep < len(self._numbered):
            oldest = self._numbered.pop(0)
            if not ranks.is_rank_zero():
                continue
            for file in (oldest, self._state_path(oldest)):
                file.unlink(missing_ok=True)
                if self.suffix == SHARDS_INDEX:
                    remove_old_shards(file)
            sidecar_path(oldest).unlink(missing_ok=True)
        return path
