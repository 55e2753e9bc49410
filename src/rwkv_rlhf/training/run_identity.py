"""Whether a run that is to be resumed is still the same one: every setting, and the files behind the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.named_model import checkpoint_file
from rwkv_rlhf.data.sources import fingerprint_of
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import fingerprint, same_fingerprint
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.settings.config import Config, settings
from rwkv_rlhf.settings.field import OnResume
from rwkv_rlhf.settings.given_files import DATA


def identity(config: Config) -> dict[str, Any]:
    """Everything that decides how the run continues, as JSON values; files by their content, so that they may move."""
    found = {}
    for name, field in settings().items():
        value, resume = getattr(config, name), field.metadata["resume"]
        if resume is OnResume.FILE:
            file = checkpoint_file(value) if name == "reward_model" and value else value  # it may be a run's folder
            found[name] = fingerprint_of(value) if name in DATA else fingerprint(file)
        elif resume is not OnResume.MAY_CHANGE:
            found[name] = value
    if not config.early_stop:
        del found["val_file"]  # it is looked at and changes nothing
    found["strategy"] = "ddp" if config.strategy == "auto" else config.strategy  # the same, also with one process
    return found | {"device": device_for(config.accelerator)}


def common_identity(config: Config, local_rank: int) -> dict[str, Any]:
    """The identity of the run, on every rank; each machine reads its own files, once.

    Raises ValueError, on every rank alike, when a file differs between machines.
    """
    found = [one for one in ranks.all_gather(identity(config) if local_rank == 0 else None) if one is not None]
    for machine, other in enumerate(found):
        names = [name for name, field in settings().items() if field.metadata["resume"] is OnResume.FILE]
        wrong = [name for name in names if other.get(name) != found[0].get(name)]
        if wrong:
            raise ValueError(
                f"{{{wrong[0]}}} {getattr(config, wrong[0])}: machine {machine} has another file than machine 0"
            )
    return found[0]


def differences(was: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two identities: sentences about what changes the training, and names of what only rounds.

    A setting that one of them does not know has its default there.
    """
    known = settings()

    def resume_of(name: str) -> OnResume:
        found: OnResume = known[name].metadata["resume"] if name in known else OnResume.SAME
        return found

    exact = was.get("bptt") == now.get("bptt") == "exact"
    wrong, rounds = [], []
    for name in sorted(was.keys() | now.keys()):
        default = known[name].default if name in known else None
        old, new = was.get(name, default), now.get(name, default)
        if old == new or (resume_of(name) is OnResume.FILE and same_fingerprint(str(old), str(new))):
            continue
        resume = resume_of(name)
        if resume is OnResume.ROUNDS or (resume is OnResume.ROUNDS_IF_EXACT and exact):
            rounds.append(f"{{{name}}}")
        elif resume is OnResume.FILE:
            wrong.append(f"{{{name}}} is another file")
        else:
            wrong.append(f"{{{name}}} was {_word(old)}, is {_word(new)}" if name in known else f"{name}: {old}, {new}")
    return wrong, rounds


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value) if value not in ("", None) else "not given"


def refuse_another_run(was: dict[str, Any], now: dict[str, Any], point: Path) -> list[str]:
    """Names of settings that change the rounding only. Raises ValueError, naming what differs, for another training."""
    wrong, rounds = differences(was, now)
    if wrong:
        raise ValueError(
            f"{point} belongs to a run with other settings ({'; '.join(wrong)}): {{resume}} goes on with the same "
            "ones; to train on with others start from a checkpoint with {load_model} or {load_adapter}"
        )
    return rounds
