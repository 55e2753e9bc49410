"""What a path that names a model stands for: a whole model, a checkpoint over its base, or the folder of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv_rlhf.checkpoints.sidecar import Sidecar, read_sidecar
from rwkv_rlhf.files import FINAL, MODEL_SUFFIXES, file_hash

FINALS = tuple(f"{FINAL}{suffix}" for suffix in MODEL_SUFFIXES.values())


class NamedModel(NamedTuple):
    """A whole model, `adapter` None; or what training saved and the model that it began from."""

    base: Path
    adapter: Path | None = None


def named_model(path: str | Path, others: Sequence[str | Path] = ()) -> NamedModel:
    """The files behind `path`. A folder stands for what its run saved at the end.

    A checkpoint of training is found by the sidecar beside it. Its base is looked for where it was, beside the
    checkpoint, and among `others`, by its hash. Raises ValueError when a file is not there.
    """
    found = checkpoint_file(path)
    sidecar = read_sidecar(found)
    if sidecar is None or not sidecar.base_sha256:
        return NamedModel(found)
    return NamedModel(_base_of(found, sidecar, others), found)


def checkpoint_file(path: str | Path) -> Path:
    """The file behind `path`: of a folder, what its run saved at the end. Raises ValueError when it is not there."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"{path}: there is no such file")
        return path
    for name in FINALS:
        if (path / name).is_file():
            return path / name
    if any(path.glob("*.safetensors")):  # a model in shards, in the folder of another program
        return path
    raise ValueError(f"{path} is a folder without {FINALS[0]}: name a file, or the folder of a run that has ended")


def _base_of(checkpoint: Path, sidecar: Sidecar, others: Sequence[str | Path]) -> Path:
    places = [Path(sidecar.base_path)] if sidecar.base_path else []
    places += [checkpoint.parent / sidecar.base_file, *map(Path, others)]
    for place in places:
        if place.is_file() and file_hash(place) == sidecar.base_sha256:
            return place
    raise ValueError(
        f"{checkpoint} was trained over {sidecar.base_path or sidecar.base_file} (sha256 {sidecar.base_sha256[:12]}), "
        "which is not there any more: put it back, or merge the two with merge.py and name the result"
    )
