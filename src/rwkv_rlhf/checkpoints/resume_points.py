"""Resume points on disk: `resume/step-<n>/` holds rank-<r>.safetensors of every rank and manifest.json with its hashes.

A point is written under a temporary name and renamed when all ranks are done, so a kill in the middle leaves the points
before it. The ranks meet through files in that folder (which all of them must see): writing happens in a thread, where
a collective operation of torch.distributed could meet one of the training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.tensor_tree import read_tree, write_tree
from rwkv_rlhf.files import FULL, atomic_write, file_hash, read_json_object, sync_folder, write_json

log = logging.getLogger(__name__)

FOLDER = "resume"
FORMAT = 1
NAME = re.compile(r"^step-(\d+)$")
MANIFEST = "manifest.json"
KEPT = 2  # points
PATIENCE = 600.0  # seconds that rank 0 waits for the files of the others


class Damaged(ValueError):
    """Bytes of a point are missing or are not those that were written."""


@dataclass(frozen=True)
class ResumePoint:
    """A whole, verified point: `about` is what its manifest says beside the hashes."""

    path: Path
    about: dict[str, Any]

    @property
    def project(self) -> Path:
        """The project folder that the point lies in."""
        return self.path.parent.parent

    def read(self, rank: int) -> Any:
        """What rank `rank` wrote. Raises ValueError."""
        return read_tree(self.path / _rank_file(rank))


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def points_in(folder: Path) -> list[Path]:
    """The points in a resume folder, the last written first; one whose manifest cannot be read counts as the last."""
    found = [entry for entry in folder.iterdir() if NAME.match(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (_serial(path), int(path.name[5:])), reverse=True)


def _serial(path: Path) -> float:
    try:
        serial: int = _manifest(path)["about"]["serial"]
        return serial
    except Damaged:
        return float("inf")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json_object(path / MANIFEST)
        content = {"about": manifest["about"], "files": manifest["files"]}
        whole = _digest(content) == manifest["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST} is missing or damaged") from error
    if not whole:
        raise Damaged(f"{path / MANIFEST} is damaged: its bytes are not those that were written")
    return content


def open_point(path: Path) -> ResumePoint:
    """The point in the folder `path`, every file compared with its hash.

    Raises Damaged for flipped or missing bytes, ValueError for a point of a later program.
    """
    content = _manifest(path)
    if content["about"]["format"] > FORMAT:
        raise ValueError(f"{path} has format {content['about']['format']}, this program reads up to {FORMAT}")
    for name, sha256 in content["files"].items():
        file = path / name
        if not file.exists():
            raise Damaged(f"{file} is missing")
        if file_hash(file) != sha256:
            raise Damaged(f"{file} is damaged: its bytes are not those that were written")
    return ResumePoint(path, content["about"])


def last_point(folder: Path) -> ResumePoint | None:
    """The last whole point in a resume folder, None where there never was one.

    Damaged ones are passed over with a warning. Raises ValueError when none is whole.
    """
    wrong: list[str] = []
    for path in points_in(folder):
        try:
            point = open_point(path)
        except Damaged as damage:
            wrong.append(str(damage))
            continue
        for sentence in wrong:
            log.warning("%s: resuming from %s instead", sentence, point.path)
        return point
    if wrong:
        raise ValueError(f"no resume point in {folder} is whole ({'; '.join(wrong)}): start again without {{resume}}")
    return None


class ResumePoints:
    """Writes the points of one run into `folder`, and keeps the last two of them.

    `about` goes into every manifest. `resumed` is the point that the run resumes from: points of other runs are
    removed when the first one of this run is whole.
    """

    def __init__(self, folder: Path, about: dict[str, Any], resumed: Path | None = None) -> None:
        self.folder = folder
        self.about = about
        self.kept = [resumed] if resumed is not None and resumed.parent.resolve() == folder.resolve() else []
        self.rank, self.world, self.token = 0, 1, "0"

    def join(self, rank: int, world: int, token: str) -> None:
        """This is rank `rank` of `world`; `token` is the same on all of them and new in every run."""
        self.rank, self.world, self.token = rank, world, token
        if rank == 0 and self.folder.is_dir():
            for left in self.folder.glob(".*"):  # a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def write(self, place: dict[str, int], tree: Any) -> Path:
        """Write this rank's part of a point; rank 0 returns when the point is whole.

        `place` goes into the manifest: optimizer `step`, `epoch`, and `done` micro-batches of that mini-epoch.

        Raises ValueError in one sentence when it cannot be written; the points before it stay.
        """
        path = self.folder / f"step-{place['step']}"
        temporary = self.folder / f".{path.name}-{self.token}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            sha256 = write_tree(tree, temporary / _rank_file(self.rank))
            if self.rank:
                with atomic_write(temporary / f"rank-{self.rank}.sha256") as file:
                    file.write(sha256.encode())
            else:
                self._commit(place, path, temporary, {_rank_file(0): sha256} | self._others(temporary))
        except (OSError, ValueError) as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            full = isinstance(error, OSError) and error.errno in FULL
            why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
            before = f"{self.kept[-1].name} is whole" if self.kept else "there is none before it"
            raise ValueError(f"the resume point {path} cannot be written: {why}; {before}") from error
        return path

    def _others(self, temporary: Path) -> dict[str, str]:
        """Hashes of the other ranks' files, as soon as they are all there."""
        found: dict[str, str] = {}
        deadline = time.monotonic() + PATIENCE
        for rank in range(1, self.world):
            note = temporary / f"rank-{rank}.sha256"
            while not note.exists():
                if time.monotonic() > deadline:
                    raise ValueError(f"rank {rank} has not written its part in {PATIENCE:.0f} s")
                time.sleep(0.05)
            found[_rank_file(rank)] = note.read_text()
            note.unlink()
        return found

    def _commit(self, place: dict[str, int], path: Path, temporary: Path, files: dict[str, str]) -> None:
        """Make the point whole: manifest, rename, and then away with those that are not needed any more."""
        there = points_in(self.folder)
        serials = [serial for other in there if (serial := _serial(other)) != float("inf")]
        about = self.about | place | {"format": FORMAT, "world": self.world}
        content = {"about": about | {"serial": max(serials, default=0) + 1}, "files": files}
        write_json(temporary / MANIFEST, content | {"sha256": _digest(content)})
        if path.exists():  # of another run, damaged, or the very same again
            aside = self.folder / f".{path.name}-old"
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(temporary, path)
        sync_folder(self.folder)
        self.kept = [*(point for point in self.kept if point.name != path.name), path][-KEPT:]
        names = {point.name for point in self.kept}
        for other in there:
            if other.name not in names:
                shutil.rmtree(other, ignore_errors=True)


def explicit_point(path: Path) -> ResumePoint:
    """--resume PATH: a point, or the last one of a resume folder or a project folder. Raises ValueError."""
    if NAME.match(path.name) and (path / MANIFEST).exists():
        return open_point(path)
    for folder in (path, path / FOLDER):
        found = last_point(folder)
        if found is not None:
            return found
    raise ValueError(
        f"{{resume}} {path}: there is no resume point; give a project folder or one of its {FOLDER}/step-<n>"
    )
