"""Our model as the class that lm-evaluation-harness asks (EleutherAI, package lm_eval), and a run of its tasks.

The only file that imports the harness.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.eval_tasks import YAML
from rwkv_rlhf.tasks.text_model import Question, TextModel

log = logging.getLogger(__name__)

SEED = 1234  # of the examples that are shown before a question, as the harness has it
LONGEST = 256  # tokens of an answer, where a task does not say, as in the harness
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """`TextModel` behind the names of the harness; requests carry their arguments in `args`."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-probability in nats, whether it is what greedy decoding gives)."""
        asked = [self.model.pair(*request.args) for request in requests]
        return [(one.logp, one.greedy) for one in self.model.likelihoods(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """(text,) -> log-probability of the whole text."""
        return self.model.whole([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """(context, how to generate) -> the answer."""
        return self.model.answers([Question(request.args[0], params_of(request.args[1])) for request in requests])


def params_of(asked: Mapping[str, Any]) -> SamplingParams:
    """How a task wants its answers: greedily, unless it says do_sample."""
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else until
    lengths = [int(asked[name]) for name in LENGTHS if asked.get(name)]
    sampled = bool(asked.get("do_sample", asked.get("temperature")))
    return SamplingParams(
        temperature=float(asked.get("temperature") or 1.0) if sampled else 0.0,
        top_p=float(asked.get("top_p") or 1.0),
        top_k=int(asked.get("top_k") or 0),
        max_tokens=(lengths or [LONGEST])[0],
        stop_texts=tuple(stop for stop in stops if stop),
    )


@functools.cache  # reading the list of all tasks takes seconds
def manager(defaults: bool) -> Any:
    """What knows the tasks: those of the harness if `defaults`, else only files."""
    return TaskManager(include_defaults=defaults)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, the harness and the library that reads its data draw no bars of their own into ours."""
    drawn = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with mock.patch.object(lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def said_of(name: str, task: Any, limit: int) -> str:
    """The name of a task and how many questions it asks, where that is known before they are read."""
    rows = task.eval_docs
    if not isinstance(rows, Sized):
        return name
    return f"{name} ({counted(min(len(rows), limit or len(rows)), 'question')})"


def harness_figures(names: Sequence[str], model: TextModel, limit: int = 0) -> dict[str, float]:
    """ "TASK/FIGURE" -> number, of the first `limit` examples of each task (0 = all).

    Raises ValueError for a name that the harness does not know, and for a task whose data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    files = all(name.endswith(YAML) for name in names)
    known = set() if files else set(manager(True).all_tasks)
    for name in names:
        if name not in known and not name.endswith(YAML):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{{eval_tasks}} {name}: lm-evaluation-harness has no task of this name{meant}")
    try:
        asked = [str(Path(name).resolve()) if name.endswith(YAML) else name for name in names]
        with without_bars():
            tasks = manager(not files).load(asked)
    except Exception as error:  # a YAML that is none, data that is not here: the libraries have a class for each
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{{eval_tasks}} {', '.join(names)}: {type(error).__name__}: {first}") from error
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    log.info(
        "lm-evaluation-harness: %s", ", ".join(said_of(name, task, limit) for name, task in tasks["tasks"].items())
    )
    with without_bars():
        found = lm_eval.evaluate(
            HarnessModel(model), tasks, limit=limit or None, bootstrap_iters=0, log_samples=False, verbosity=None
        )
    return {
        f"{task}/{figure.removesuffix(',none')}": float(value)
        for task, figures in found["results"].items()
        for figure, value in figures.items()
        if isinstance(value, int | float) and "_stderr" not in figure and "," in figure
    }
