"""CSV, JSONL or parquet of prompts and chosen answers -> CSV or JSONL with rejects sampled from a model.

Rejects that are there are kept (--overwrite 1 replaces them). A run that was stopped or killed goes on where it ended
when the same command is given again; OUT.json beside the output says which model made it, and another one may not go
on. The same seed gives the same answers. With --devices N (or torchrun) the rows are shared among N processes.
"""

import itertools
import json
import logging
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from rwkv_rlhf.commands.flag_values import reading_of
from rwkv_rlhf.commands.parsers.generate_rejects import parser
from rwkv_rlhf.commands.several import several
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.generation.rejects import fill, read_tasks
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams, options, sampling_params
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.shapes import PROMPT

log = logging.getLogger("rejects")

SHOWN = 3  # rejects that are printed at the end
LONGEST = 100  # characters of a text there


def made_by(flags: Namespace) -> dict[str, Any]:
    """What the rejects depend on, for OUT.json: model, adapter, template, vocabulary, sampling, seed."""
    sampling = {field.name: getattr(flags, field.name) for field in options()}
    sampling["decay"] = sampling.pop("penalty_decay")  # its name in files of older versions
    return sampling | {
        "tries": flags.tries,
        "model": file_hash(flags.load_model),
        "adapter": file_hash(flags.load_adapter) if flags.load_adapter else None,
        "template": flags.template if flags.template in TEMPLATES else file_hash(flags.template),
        "vocab_file": file_hash(flags.vocab_file) if flags.vocab_file else None,
    }


def main(argv: Sequence[str]) -> None:
    """Reads, samples, writes as it goes, prints what happened."""
    flags = parser().parse_args(argv)
    params = sampling_params(flags)
    find_templates(flags.template)
    refuse_sources(flags.input_csv, flags.output_csv, "--output_csv")
    with several(flags, "generate_rejects", argv):
        sample(flags, params)


def sample(flags: Namespace, params: SamplingParams) -> None:
    """The work of one process, which may be one of several."""
    report = DataReport(flags.input_csv, skip_bad=flags.skip_bad)
    columns, tasks = read_tasks(flags.input_csv, flags.template, report, reading_of(flags))
    for line in report.found:
        log.info("%s", line)
    output = RejectFile(flags.output_csv, columns, made_by(flags))
    for task in tasks:  # whatever cannot be written is known before anything is sampled
        output.row(task.cells, task.reject)
    model, tokenizer = open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file)
    begun = time.perf_counter()
    with progress_bar(len(tasks), "rejects", shown=ranks.is_rank_zero()) as done:
        tally = fill(
            Sampler(model, tokenizer),
            tasks,
            output,
            params,
            at_once=flags.batch_size,
            tries=flags.tries,
            overwrite=flags.overwrite,
            progress=done,
        )
    if tally.resumed == len(tasks):
        log.info("%s had every row already; remove it, or use --overwrite 1, to sample again", flags.output_csv)
        return
    skipped = [f"{counted(count, 'row')} left out: {reason}" for reason, count in report.skipped.items()]
    for line in [*tally.lines(), *skipped]:
        log.info("%s", line)
    rows = counted(len(tasks), "row")
    log.info("wrote %s to %s in %.1f s", rows, flags.output_csv, time.perf_counter() - begun)
    if ranks.is_rank_zero():
        print("\n".join(some_rejects(output)))


def some_rejects(output: RejectFile) -> Iterator[str]:
    """The first rejects of the file, each under its prompt: one sees at a glance what they are."""
    first = itertools.islice(output.log.records(), SHOWN + 1)  # that of a CSV is its header
    for row in output.rows.decode(b"".join(first))[:SHOWN]:
        prompt = next((row[name] for name in PROMPT if row.get(name)), "")
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        yield f"prompt: {shortened(text)}"
        yield f"  {output.reject}: {shortened(str(row.get(output.reject, '')))}"


def shortened(text: str) -> str:
    """A text in one line of at most LONGEST characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
