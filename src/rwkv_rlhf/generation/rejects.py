"""Rejected answers: for rows with a prompt and a chosen answer, sample what the model itself would have said.

The output grows in input order, each batch flushed to the disk, so a run that was stopped goes on where it ended.
"""

import dataclasses
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rwkv_rlhf.data.conversation import is_missing, normalise
from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.pairs.text_pairs import TextPair, text_pair
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.settings.shapes import REJECT

log = logging.getLogger(__name__)

WIDEN = 0.2  # each further try of a row may pick from this much more of the distribution


@dataclass
class Task:
    """One row of the input: its cells by column, the checked pair, and how the model is asked."""

    cells: dict[str, Any]
    pair: TextPair
    reject: Any  # as it stands in the input; pair.reject is its text
    template: Template
    cue: str  # the conversation and the cue for an answer, as training writes them


@dataclass
class Tally:
    """What happened to the rows of one run."""

    resumed: int = 0
    kept: int = 0
    sampled: int = 0
    again: int = 0  # sampled rows that needed more than one try
    empty: list[int] = field(default_factory=list)  # rows (from 1) for which no usable answer came
    unfinished: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent sampling them
    together: int = 0  # most sequences at once

    def lines(self) -> list[str]:
        """Sentences for the user; what did not happen is left out."""
        out = [f"{self.sampled} rejects sampled, {self.kept} kept as they were"]
        if self.tokens:
            rate = self.tokens / max(self.seconds, 1e-9)
            speed = f"{self.tokens} tokens in {self.seconds:.1f} s: {rate:.0f} tokens/s"
            out.append(f"{speed}, up to {self.together} answers at once")
        if self.resumed:
            out.append(f"{self.resumed} rows were kept from an earlier run")
        if self.again:
            out.append(f"{self.again} needed another try (the answer was empty or equal to chosen)")
        if self.unfinished:
            out.append(f"{self.unfinished} reached --max_tokens before they ended")
        if self.empty:
            some = ", ".join(map(str, self.empty[:8])) + (" ..." if len(self.empty) > 8 else "")
            out.append(f"{len(self.empty)} left empty: every try was empty or equal to chosen (row {some})")
        return out


def read_tasks(
    path: str | os.PathLike[str], template: str, report: DataReport | None = None, reading: Reading | None = None
) -> tuple[list[str], list[Task]]:
    """(columns of the output, rows) of files with preference pairs of which the rejected answer may be absent.

    `report` counts, and decides whether bad rows are an error or left out. Raises ValueError with file and line for a
    missing column, an empty prompt or chosen, bytes that are not UTF-8.
    """
    report = report or DataReport(str(path))
    rng = random.Random(TEMPLATE_SEED)
    tasks: list[Task] = []
    columns: dict[str, None] = {}  # a set that keeps its order
    reading = dataclasses.replace(reading or Reading(), spare_reject=True)
    for where, item, cells in read_items(path, report, ("pairs",), reading):
        reject = next((cells[name] for name in REJECT if not is_missing(cells.get(name))), "")
        try:
            pair = text_pair(item, where)
            drawn = draw_template(template, rng)
            cue = drawn.prompt(pair.turns, [pair.chosen])  # a chat template may refuse it
        except RowError as error:
            report.bad(where, error)
            continue
        columns |= dict.fromkeys(cells)
        tasks.append(Task(cells, pair, reject, drawn, cue))
    if not tasks:
        raise ValueError(f"{path} has no row that could be used" if report.rows else f"{path} has no row")
    if not set(REJECT) & set(columns):
        columns[REJECT[0]] = None
    return list(columns), tasks


def batches(tasks: list[Task], begin: int, size: int, overwrite: bool) -> Iterator[tuple[range, list[int]]]:
    """(rows to write next, those of them to sample), with at most `size` to sample at a time."""
    first, wanted = begin, []
    for row in range(begin, len(tasks)):
        if overwrite or not tasks[row].pair.reject:
            wanted.append(row)
        if len(wanted) == size or row == len(tasks) - 1:
            yield range(first, row + 1), wanted
            first, wanted = row + 1, []


def answer_of(task: Task, text: str) -> str:
    """Sampled text as the text of an answer: without what the cue of the g1 template left open, and without NUL bytes.

    The readers take those for a sign of another encoding, and would refuse the file that this goes into.
    """
    if task.cue.endswith("</think"):
        text = text.removeprefix(">")
    elif task.cue.endswith("<think"):
        text = "<think" + text
    return normalise(text.replace("\0", ""))


def sample_rows(
    sampler: Sampler, tasks: list[Task], rows: list[int], params: SamplingParams, tries: int, tally: Tally
) -> list[str]:
    """A reject for each of `rows`, "" where every try was empty or equal to chosen. Seeds depend on the row only."""
    assert sampler.tokenizer is not None
    answers = dict.fromkeys(rows, "")
    for attempt in range(tries):
        left = [row for row in rows if not answers[row]]
        if not left:
            break
        stops = sorted({tasks[row].template.end or "\n\n" for row in left})
        wider = min(1.0, params.top_p + WIDEN * attempt)
        begun = time.perf_counter()
        done = sampler.generate(
            [tasks[row].template.ids(tasks[row].cue, sampler.tokenizer) for row in left],
            dataclasses.replace(params, top_p=wider, stop_texts=tuple(stops)),
            seeds=[sequence_seed(sequence_seed(params.seed, row), attempt) for row in left],
        )
        tally.seconds += time.perf_counter() - begun
        tally.tokens += sum(len(one.tokens) for one in done)
        tally.together = max(tally.together, len(left))
        for row, one in zip(left, done, strict=True):
            text = answer_of(tasks[row], one.text)
            if not text or text == tasks[row].pair.chosen:
                continue
            answers[row] = text
            if attempt:
                tally.again += 1
            if not one.finished:
                tally.unfinished += 1
    tally.empty += [row + 1 for row in rows if not answers[row]]
    tally.sampled += sum(1 for text in answers.values() if text)
    return list(answers.values())


def fill(
    sampler: Sampler,
    tasks: list[Task],
    output: RejectFile,
    params: SamplingParams,
    *,
    batch_size: int = 8,
    tries: int = 4,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> Tally:
    """Writes every row of `tasks` to `output`, sampling the rejects that are missing (all of them with overwrite).

    Goes on behind the rows that `output` already has; progress(rows) is called with how many more are there.

    Args:
        batch_size: rows sampled together. tries: for an answer that is empty or equal to chosen; each further one
            may pick from more of the distribution.
    """
    tally = Tally(resumed=output.resume([task.cells for task in tasks], overwrite))
    progress(tally.resumed)
    for rows, wanted in batches(tasks, tally.resumed, batch_size, overwrite):
        new = dict(zip(wanted, sample_rows(sampler, tasks, wanted, params, tries, tally) if wanted else []))
        output.append([output.row(tasks[row].cells, new.get(row, tasks[row].reject)) for row in rows])
        tally.kept += len(rows) - len(wanted)
        progress(len(rows))
    return tally
