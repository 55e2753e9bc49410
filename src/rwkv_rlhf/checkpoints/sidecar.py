"""What explains a checkpoint, saved beside it as `rwkv-{n}.json`: merging needs no flags for rank or alpha."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_rlhf.checkpoints.shards import WAITING, remove_old_shards
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.files import SHARDS_INDEX, file_hash, read_json_object, sync_folder, write_json
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.plan import Plan
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import PROGRAM_VERSION

STATE_LAYOUT = "value x key"  # of every (H, N, N) state that this program writes
FORMAT = 1


@dataclass(frozen=True)
class Sidecar:
    """Everything that a checkpoint of training does not say itself.

    `adapted` holds mode, rank, alpha and scaling by layer name, `packed` the layers whose frozen matrix was kept as
    `quant_mode` while training, `plan` the rows of the layer profile. `base_path` is where `base_file` was; its
    `base_sha256` is "" for a run from zero.
    `initial_file` in the same folder holds PiSSA's initial factors, `cold_file` is the adapter that was merged into the
    base before training ("" without). `template` is how conversations were written (--template), `begun` the time of
    the run's first start, which chat templates may ask for, `run` the id of the run in its folder's run.json, `sha256`
    that of the checkpoint itself; all "" in files of older programs.
    """

    version: str
    base_file: str = ""
    base_path: str = ""
    base_sha256: str = ""
    quant_mode: str = "none"
    packed: tuple[str, ...] = ()
    adapted: Mapping[str, Adaptation] = field(default_factory=dict)
    plan: tuple[dict[str, Any], ...] = ()
    initial_file: str = ""
    initial_sha256: str = ""
    cold_file: str = ""
    cold_sha256: str = ""
    template: str = ""
    run: str = ""
    begun: str = ""
    sha256: str = ""
    state_layout: str = STATE_LAYOUT
    program_version: str = PROGRAM_VERSION
    format: int = FORMAT


def sidecar_of(version: str, layout: Layout, plan: Plan | None, base: str | Path | None, sha256: str = "") -> Sidecar:
    """The sidecar of a run that started from the file `base` (None = from zero); hashes it unless `sha256` is given."""
    rows = tuple(dataclasses.asdict(row) for row in plan.rows.values()) if plan else ()
    return Sidecar(
        version=version,
        base_file=Path(base).name if base else "",
        base_path=str(Path(base).resolve()) if base else "",
        base_sha256=sha256 or (file_hash(base) if base else ""),
        quant_mode=layout.store,
        packed=tuple(sorted(layout.packed)),
        adapted=dict(layout.adapted),
        plan=rows,
    )


def sidecar_path(checkpoint: str | Path) -> Path:
    """`rwkv-3.pth` -> `rwkv-3.json` in the same folder."""
    path = Path(checkpoint)
    if path.name.endswith(SHARDS_INDEX):
        return path.with_name(f"{path.name.removesuffix(SHARDS_INDEX)}.json")
    return path.with_suffix(".json")


def write_sidecar(sidecar: Sidecar, checkpoint: str | Path) -> Path:
    """Write `sidecar` beside `checkpoint`, with the checkpoint's hash; raises ValueError when it cannot be written."""
    path = sidecar_path(checkpoint)
    sidecar = dataclasses.replace(sidecar, sha256=file_hash(checkpoint) if Path(checkpoint).exists() else "")
    write_json(path, dataclasses.asdict(sidecar))
    return path


def write_checkpoint(tensors: Mapping[str, Tensor], sidecar: Sidecar, path: Path) -> None:
    """Write `tensors` to `path` and `sidecar` beside it, in the place of older ones; ValueError when it cannot be done.

    Both are ready before either takes its place: a kill leaves the older checkpoint with its sidecar, unless it falls
    between two renames.
    """
    fresh = path.with_name(f"{WAITING}{path.name}")
    try:
        write_tensors(tensors, fresh)
        write_sidecar(sidecar, fresh)
        os.replace(fresh, path)
        os.replace(sidecar_path(fresh), sidecar_path(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)
        sidecar_path(fresh).unlink(missing_ok=True)
        if path.name.endswith(SHARDS_INDEX):
            remove_old_shards(path)
    sync_folder(path.parent)


def read_sidecar(checkpoint: str | Path) -> Sidecar | None:
    """The sidecar beside `checkpoint`, None when there is no such file (checkpoints of older programs).

    Fields that this program does not know are ignored. Raises ValueError when the file is not a sidecar.
    """
    path = sidecar_path(checkpoint)
    if not path.exists():
        return None
    content = read_json_object(path, "a sidecar of this program")
    if "format" not in content:
        raise ValueError(f"{path} is not a sidecar of this program (it has no format)")
    number = content["format"]
    if type(number) is int and number > FORMAT:
        raise ValueError(f"{path} has format {number}, this program reads up to {FORMAT}: update it")
    try:
        return _sidecar(content)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a sidecar of this program ({type(error).__name__}: {error})") from error


def _sidecar(content: dict[str, Any]) -> Sidecar:
    """What a sidecar's JSON says. Raises KeyError, TypeError, ValueError and the like for what no program wrote."""
    plain = {f.name: f.type for f in dataclasses.fields(Sidecar) if f.type in ("str", "int")}
    known = {name: content[name] for name in plain if name in content}
    for name, value in known.items():
        if type(value).__name__ != plain[name]:
            raise TypeError(f"{name} is a {type(value).__name__}")
    known["adapted"] = {name: _adaptation(name, entry) for name, entry in content["adapted"].items()}
    known["packed"], known["plan"] = tuple(content["packed"]), tuple(content["plan"])
    if not all(isinstance(name, str) for name in known["packed"]):
        raise TypeError("packed holds other things than names")
    if known.get("quant_mode", "none") not in (tables.DENSE, *STORES):
        raise ValueError(f"quant_mode {known['quant_mode']!r} is not one of {', '.join((tables.DENSE, *STORES))}")
    return Sidecar(**known)


def _adaptation(name: str, entry: dict[str, Any]) -> Adaptation:
    how = Adaptation(**entry)
    numbers = (how.alpha, how.scaling, how.dropout)
    if how.mode not in ADAPTERS:
        raise ValueError(f"the adapter of {name} has mode {how.mode!r}, not one of {', '.join(ADAPTERS)}")
    if type(how.rank) is not int or not all(type(n) in (int, float) for n in numbers):
        raise TypeError(f"the adapter of {name} is not described by a mode, a rank and numbers")
    if how.rank < 1 or not all(math.isfinite(n) for n in numbers) or not 0 <= how.dropout < 1:
        raise ValueError(f"the adapter of {name} has rank {how.rank}, alpha {how.alpha}, dropout {how.dropout}")
    return how


def check_whole(sidecar: Sidecar | None, checkpoint: str | Path) -> None:
    """Raises ValueError when the bytes of `checkpoint` are not those that its sidecar was written for."""
    if sidecar is not None and sidecar.sha256 and file_hash(checkpoint) != sidecar.sha256:
        own = sidecar_path(checkpoint).name
        raise ValueError(f"{checkpoint} is damaged: its bytes are not those that were saved (sha256 in {own})")
