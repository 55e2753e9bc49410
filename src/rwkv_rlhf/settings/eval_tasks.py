"""--eval_tasks: which evaluation tasks a run is judged by, and what each of them needs."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from rwkv_rlhf.settings.optional import require

LAMBADA = "lambada:"  # before the file
HARNESS = "lm_eval"  # the package of lm-evaluation-harness
YAML = (".yaml", ".yml")  # a task of one's own


class EvalTasks(NamedTuple):
    """Files of LAMBADA, and tasks of lm-evaluation-harness by name or as YAML files."""

    lambada: tuple[str, ...]
    harness: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.lambada or self.harness)


def eval_tasks(spec: str) -> EvalTasks:
    """What --eval_tasks names."""
    words = [word.strip() for word in spec.split(",") if word.strip()]
    files = tuple(word.removeprefix(LAMBADA) for word in words if word.startswith(LAMBADA))
    return EvalTasks(files, tuple(word for word in words if not word.startswith(LAMBADA)))


def files_of(tasks: EvalTasks) -> Iterator[str]:
    """The files that tasks are read from."""
    yield from tasks.lambada
    yield from (name for name in tasks.harness if name.endswith(YAML))


def check_eval_tasks(spec: str) -> None:
    """Raises ValueError for a file that is not there, and where the harness is asked for and not installed."""
    tasks = eval_tasks(spec)
    if spec and not tasks:
        raise ValueError(f"{{eval_tasks}} {spec!r} names no task")
    for path in files_of(tasks):
        if not os.path.isfile(path):
            raise ValueError(f"{{eval_tasks}} {spec}: there is no file {path!r}")
    if tasks.harness:
        require(f"{{eval_tasks}} {tasks.harness[0]}", HARNESS)
