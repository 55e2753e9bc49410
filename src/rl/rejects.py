"""Answers to turn down: for rows with a prompt and a chosen answer, sample what the model itself would have said.

The output CSV grows in input order, each batch flushed to the disk, so a run that was stopped goes on where it ended.
"""

import csv
import io
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from src.data.pair_rows import RawPair, to_pair
from src.data.report import DataReport, RowError
from src.data.rows import read_csv
from src.data.templates import Form, draw_form, normalise
from src.files import atomic_write, read_bytes
from src.rl.sampling import generate, sequence_seed

log = logging.getLogger(__name__)

PROMPT, CHOSEN, REJECT = ("prompt", "question"), ("chosen",), ("reject", "rejected")
TEMPLATE_SEED = 100  # the tradition's, for `mixed`
WIDEN = 0.2  # each further try of a row may pick from this much more of the distribution


@dataclass
class Task:
    """One row of the input: its cells by column, the checked pair, and the form in which the model is asked."""

    cells: dict[str, str]
    pair: RawPair
    form: Form
    reject: str


@dataclass
class Settings:
    """How answers are sampled; see `generate`. `tries` counts the first one."""

    temperature: float = 1.0
    top_p: float = 0.3
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 1.0
    decay: float = 0.996
    max_tokens: int = 1000
    seed: int = 0
    batch_size: int = 8
    tries: int = 4


@dataclass
class Tally:
    """What happened to the rows of one run."""

    resumed: int = 0
    kept: int = 0
    sampled: int = 0
    again: int = 0  # sampled rows that needed more than one try
    empty: list[int] = field(default_factory=list)  # rows (from 1) for which no usable answer came
    unfinished: int = 0

    def lines(self) -> list[str]:
        """Sentences for the user; what did not happen is left out."""
        out = [f"{self.sampled} rejects sampled, {self.kept} kept as they were"]
        if self.resumed:
            out.append(f"{self.resumed} rows were there from an earlier run")
        if self.again:
            out.append(f"{self.again} needed another try (the answer was empty or equal to chosen)")
        if self.unfinished:
            out.append(f"{self.unfinished} reached --max_tokens before they ended")
        if self.empty:
            some = ", ".join(map(str, self.empty[:8])) + (" ..." if len(self.empty) > 8 else "")
            out.append(f"{len(self.empty)} left empty: every try was empty or equal to chosen (row {some})")
        return out


def read_tasks(path: str | os.PathLike, template: str) -> tuple[list[str], list[Task]]:
    """(columns of the output, rows) of a CSV with prompt and chosen; reject may be absent or empty.

    Raises ValueError with file and line for a missing column, an empty prompt or chosen, bytes that are not UTF-8.
    """
    report = DataReport(str(path))
    forms = random.Random(TEMPLATE_SEED)
    tasks: list[Task] = []
    for where, cells in read_csv(path, report, (PROMPT, CHOSEN)):
        reject = next((cells[name] for name in REJECT if name in cells), "")
        try:
            pair = to_pair({**cells, "reject": reject}, where, need_reject=False)
        except RowError as error:
            raise ValueError(f"{where}: {error}") from error
        tasks.append(Task(cells, pair, draw_form(template, forms), reject))
    if not tasks:
        raise ValueError(f"{path} has no row below its header")
    columns = list(tasks[0].cells)
    if not set(REJECT) & set(columns):
        columns.append(REJECT[0])
    return columns, tasks


class RejectFile:
    """The output: a header and finished rows in input order. Only ever appended to, whole rows at a time."""

    def __init__(self, path: str | os.PathLike, columns: list[str]) -> None:
        self.path = Path(path)
        self.columns = columns
        self.reject = next(name for name in REJECT if name in columns)

    def resume(self, tasks: list[Task], anew: bool) -> int:
        """Rows already there, after repairing a row cut off in the middle; makes the file if there is none.

        With `anew` a finished file is begun again. Raises ValueError when the file holds other rows than the input.
        """
        rows = self._finished_rows() if self.path.exists() else []
        if not rows or (anew and len(rows) - 1 >= len(tasks)):
            with atomic_write(self.path) as file:
                file.write(_csv([self.columns]))
            return 0
        other = "give another --output_csv, or remove it to begin again"
        if rows[0] != self.columns:
            raise ValueError(
                f"{self.path} has the columns {', '.join(rows[0])}, not {', '.join(self.columns)}: {other}"
            )
        if len(rows) - 1 > len(tasks):
            raise ValueError(f"{self.path} has {len(rows) - 1} rows, the input has {len(tasks)}: {other}")
        for number, (row, task) in enumerate(zip(rows[1:], tasks), 1):
            if row != self.row(task, row[self.columns.index(self.reject)] if len(row) == len(self.columns) else ""):
                raise ValueError(f"{self.path} row {number} is not row {number} of the input: {other}")
        return len(rows) - 1

    def _finished_rows(self) -> list[list[str]]:
        """Whole rows of the file; what follows the last of them (a stop in the middle of a write) is cut off."""
        data = read_bytes(self.path)
        end = _end_of_rows(data)
        if end < len(data):
            log.info("%s: its last row was cut off and is written again", self.path)
            os.truncate(self.path, end)
        try:
            text = data[:end].decode("utf-8-sig")
            return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} is not a CSV file that this program wrote ({error})") from error

    def row(self, task: Task, reject: str) -> list[str]:
        """The cells of one output row."""
        return [reject if name == self.reject else task.cells[name] for name in self.columns]

    def append(self, rows: list[list[str]]) -> None:
        """Adds finished rows and waits until they are on the disk."""
        with open(self.path, "ab") as file:
            file.write(_csv(rows))
            file.flush()
            os.fsync(file.fileno())


def _csv(rows: list[list[str]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode("utf-8", errors="replace")


def _end_of_rows(data: bytes) -> int:
    """Where the last whole row ends: behind the last line break that is not inside quotation marks."""
    quoted, end = False, 0
    for place in (i for i, byte in enumerate(data) if byte in b'"\n'):
        if data[place] == ord('"'):
            quoted = not quoted
        elif not quoted:
            end = place + 1
    return end


def batches(tasks: list[Task], begin: int, size: int, overwrite: bool) -> Iterator[tuple[range, list[int]]]:
    """(rows to write next, those of them to sample), with at most `size` to sample at a time."""
    first, wanted = begin, []
    for row in range(begin, len(tasks)):
        if overwrite or not normalise(tasks[row].reject):
            wanted.append(row)
        if len(wanted) == size or row == len(tasks) - 1:
            yield range(first, row + 1), wanted
            first, wanted = row + 1, []


def prompt_ids(tokenizer, task: Task) -> list[int]:
    """The conversation and the cue for an answer, as training writes them."""
    return tokenizer.encode(task.form.prompt(task.pair.turns, [task.pair.chosen]))


def answer_of(task: Task, text: str) -> str:
    """Sampled text as the text of an answer: without what the cue of the g1 template left open."""
    cue = task.form.prompt(task.pair.turns, [task.pair.chosen])
    if cue.endswith("</think"):
        text = text.removeprefix(">")
    elif cue.endswith("<think"):
        text = "<think" + text
    return normalise(text)


def sample_rows(model, tokenizer, tasks: list[Task], rows: list[int], settings: Settings, tally: Tally) -> list[str]:
    """A reject for each of `rows`, "" where every try was empty or equal to chosen. Seeds depend on the row only."""
    answers = dict.fromkeys(rows, "")
    for attempt in range(settings.tries):
        left = [row for row in rows if not answers[row]]
        if not left:
            break
        done = generate(
            model,
            [prompt_ids(tokenizer, tasks[row]) for row in left],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=min(1.0, settings.top_p + WIDEN * attempt),
            top_k=settings.top_k,
            presence=settings.presence,
            frequency=settings.frequency,
            decay=settings.decay,
            stop_texts=("\n\n",),
            seed=[sequence_seed(sequence_seed(settings.seed, row), attempt) for row in left],
            tokenizer=tokenizer,
        )
        for row, one in zip(left, done, strict=True):
            text = answer_of(tasks[row], one.text)
            if text != tasks[row].pair.chosen:
                answers[row] = text
            if answers[row]:
                tally.again += attempt > 0
                tally.unfinished += not one.finished
    tally.empty += [row + 1 for row in rows if not answers[row]]
    tally.sampled += sum(bool(answers[row]) for row in rows)
    return [answers[row] for row in rows]


def fill(
    model,
    tokenizer,
    tasks: list[Task],
    output: RejectFile,
    settings: Settings,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Tally:
    """Writes every row of `tasks` to `output`, sampling the rejects that are missing (all of them with overwrite).

    Goes on behind the rows that `output` already has; progress(rows done so far) is called as rows are written.
    """
    tally = Tally(resumed=output.resume(tasks, overwrite))
    progress(tally.resumed)
    for rows, wanted in batches(tasks, tally.resumed, settings.batch_size, overwrite):
        new = dict(zip(wanted, sample_rows(model, tokenizer, tasks, wanted, settings, tally) if wanted else []))
        output.append([output.row(tasks[row], new.get(row, tasks[row].reject)) for row in rows])
        tally.kept += len(rows) - len(wanted)
        progress(rows.stop)
    return tally
