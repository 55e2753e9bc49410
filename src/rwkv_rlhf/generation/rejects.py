"""Rejected answers: for rows with a prompt and a chosen answer, sample what the model itself would have said.

The output grows in input order, and what is known before its turn is kept beside it, so a run that was stopped goes on
where it ended.
"""

import dataclasses
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_rlhf.data.conversation import is_missing, normalise
from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.pairs.text_pairs import TextPair, text_pair
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.generation.answers import after_cue
from rwkv_rlhf.generation.prefixes import PrefixCache
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.generation.rows import Request
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


def together(tallies: Sequence[Tally]) -> Tally:
    """What all ranks did; they began with the same rows."""
    whole = dataclasses.replace(tallies[0], empty=sorted(row for one in tallies for row in one.empty))
    for name in ("sampled", "again", "unfinished", "tokens", "together"):
        setattr(whole, name, sum(getattr(one, name) for one in tallies))
    whole.seconds = max(one.seconds for one in tallies)
    return whole


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


class Asking:
    """The requests for rows of a file, and what became of them. Seeds depend on the row and the try only."""

    def __init__(self, sampler: Sampler, tasks: list[Task], rows: Sequence[int], params: SamplingParams) -> None:
        assert sampler.tokenizer is not None
        self.tasks, self.params = tasks, params
        self.prompts = {row: tasks[row].template.ids(tasks[row].cue, sampler.tokenizer) for row in rows}
        self.prefixes = PrefixCache(sampler.model)
        self.prefixes.add_common(list(self.prompts.values()))

    def request(self, row: int, attempt: int = 0) -> Request:
        """Asks for an answer to a row; each further try may pick from more of the distribution."""
        wider = min(1.0, self.params.top_p + WIDEN * attempt)
        params = dataclasses.replace(
            self.params, top_p=wider, stop_texts=(self.tasks[row].template.end or "\n\n",), samples=1
        )
        prompt, state = self.prefixes.find(self.prompts[row])
        seed = sequence_seed(sequence_seed(sequence_seed(self.params.seed, row), attempt), 0)
        return Request(prompt, params, seed, (row, attempt), state)

    def usable(self, row: int, text: str) -> str:
        """The answer as it is written, "" when it is empty or equal to the chosen one."""
        answer = normalise(after_cue(self.tasks[row].cue, text))
        return "" if answer == self.tasks[row].pair.chosen else answer


def sample_rows(
    sampler: Sampler,
    tasks: list[Task],
    rows: Sequence[int],
    params: SamplingParams,
    tries: int,
    tally: Tally,
    at_once: int = 0,
) -> Iterator[tuple[int, str]]:
    """(row, reject) of `rows`, each as soon as it is known; "" where every try was empty or equal to chosen."""
    if not rows:
        return
    asking = Asking(sampler, tasks, rows, params)
    queue = deque(asking.request(row) for row in rows)
    tally.together = max(tally.together, min(at_once or len(rows), len(rows)))
    begun = time.perf_counter()
    for done in sampler.stream(queue, at_once=at_once):
        row, attempt = done.request.key
        tally.tokens += len(done.completion.tokens)
        tally.seconds = time.perf_counter() - begun
        text = asking.usable(row, done.completion.text)
        if not text and attempt + 1 < tries:
            queue.appendleft(asking.request(row, attempt + 1))
            continue
        if text:
            tally.sampled += 1
            tally.again += int(attempt > 0)
            tally.unfinished += int(not done.completion.finished)
        else:
            tally.empty.append(row + 1)
        yield row, text


def fill(
    sampler: Sampler,
    tasks: list[Task],
    output: RejectFile,
    params: SamplingParams,
    *,
    at_once: int = 8,
    tries: int = 4,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> Tally:
    """Writes every row of `tasks` to `output`, sampling the rejects that are missing (all of them with overwrite).

    Goes on behind the rows that `output` already has; progress(rows) is called with how many more are done. Several
    ranks share the rows; what a rank has sampled survives its end (`PartFile`), and rank 0 writes the output.

    Args:
        at_once: answers sampled together. tries: for an answer that is empty or equal to chosen.
    """
    cells = [task.cells for task in tasks]
    begin = ranks.broadcast_from_zero(lambda: output.resume(cells, overwrite))
    parts = output.parts(cells)
    found: dict[int, str] = ranks.broadcast_from_zero(parts.found)
    done = {row: reject for row, reject in found.items() if begin <= row < len(tasks)}
    tally = Tally(resumed=begin + len(done))
    missing = {row for row in range(begin, len(tasks)) if overwrite or not tasks[row].pair.reject}
    tally.kept = len(tasks) - begin - len(missing)
    progress(tally.resumed)
    left = sorted(missing - done.keys())[ranks.rank() :: ranks.world_size()]
    part = parts.of(ranks.rank())

    def write(begin: int) -> int:
        """Write the rows from `begin` on that are known; gives the first that is not."""
        end = begin
        while end < len(tasks) and (end not in missing or end in done):
            end += 1
        output.append([output.row(cells[row], done.get(row, tasks[row].reject)) for row in range(begin, end)])
        return end

    for row, text in sample_rows(sampler, tasks, left, params, tries, tally, at_once):
        done[row] = text
        if ranks.is_rank_zero() and row == begin:
            begin = write(begin)
        else:
            part.append(row, text)
        progress(1)
    everyone = ranks.all_gather((done, tally))
    for others, _ in everyone:
        done |= others
    if ranks.is_rank_zero():
        write(begin)
        parts.remove()
    return together([one for _, one in everyone])
