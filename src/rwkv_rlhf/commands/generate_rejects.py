"""CSV, JSONL or parquet of prompts and chosen answers -> CSV or JSONL with rejects sampled from a model.

Rejects that are there are kept (--overwrite 1 replaces them). A run that was stopped or killed goes on where it ended
when the same command is given again; OUT.json beside the output says which model made it, and another one may not go
on. The same seed gives the same answers.
"""

import dataclasses
import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.templates.builtin import TEMPLATES
from rwkv_rlhf.data.templates.named import check_template
from rwkv_rlhf.files import file_hash, refuse_same_file
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.generation.rejects import RejectFile, Settings, fill, read_tasks
from rwkv_rlhf.settings.command_line import Parser

log = logging.getLogger("rejects")


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Sample the answers that are to be rejected.")
    flags.add_argument("--load_model", required=True, help="checkpoint of the model that answers")
    flags.add_argument("--load_adapter", default="", help="adapter checkpoint laid over it")
    flags.add_argument("--input_csv", required=True, help=".csv, .jsonl or .parquet with prompt and chosen")
    flags.add_argument("--output_csv", default="rlhfoutput.csv", help=".csv or .jsonl to write [rlhfoutput.csv]")
    flags.add_argument("--strategy", default="cuda fp16", help="device and precision; CPU where there is no GPU")
    flags.add_switch("--overwrite", help="replace rejects that are there")
    flags.add_argument("--batch_size", type=int, default=32, help="answers sampled together [32]")
    flags.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token [1.0]")
    flags.add_argument("--top_p", type=float, default=0.3, help="share of the distribution to pick from [0.3]")
    flags.add_argument("--top_k", type=int, default=0, help="number of tokens to pick from; 0 = all [0]")
    flags.add_argument("--presence", type=float, default=0.0, help="penalty on tokens that were there [0]")
    flags.add_argument("--frequency", type=float, default=1.0, help="penalty per occurrence [1.0]")
    flags.add_argument("--penalty_decay", type=float, default=0.996, help="decay of the penalty per token [0.996]")
    flags.add_argument("--max_tokens", type=int, default=1000, help="longest answer in tokens [1000]")
    flags.add_argument("--tries", type=int, default=4, help="tries for an answer that is empty or equals chosen [4]")
    flags.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)}, or a Jinja file [world]")
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")
    flags.add_switch("--skip_bad", help="count and leave out bad rows instead of stopping")
    return flags


def made_by(flags: Namespace, settings: Settings) -> dict[str, Any]:
    """What the rejects depend on, for OUT.json: model, adapter, template, vocabulary, sampling, seed."""
    sampling = dataclasses.asdict(settings)
    del sampling["batch_size"]  # each row has its own seed
    return sampling | {
        "model": file_hash(flags.load_model),
        "adapter": file_hash(flags.load_adapter) if flags.load_adapter else None,
        "template": flags.template if flags.template in TEMPLATES else file_hash(flags.template),
        "vocab_file": file_hash(flags.vocab_file) if flags.vocab_file else None,
    }


def main(argv: Sequence[str]) -> None:
    """Reads, samples, writes as it goes, prints what happened."""
    flags = parser().parse_args(argv)
    if min(flags.batch_size, flags.max_tokens, flags.tries) < 1:
        raise ValueError("--batch_size, --max_tokens and --tries must be at least 1")
    check_template(flags.template)
    refuse_same_file(flags.input_csv, flags.output_csv, "--output_csv")
    report = DataReport(flags.input_csv, skip_bad=flags.skip_bad)
    columns, tasks = read_tasks(flags.input_csv, flags.template, report)
    model, tokenizer = open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file)
    settings = Settings(
        temperature=flags.temperature,
        top_p=flags.top_p,
        top_k=flags.top_k,
        presence=flags.presence,
        frequency=flags.frequency,
        decay=flags.penalty_decay,
        max_tokens=flags.max_tokens,
        seed=flags.seed,
        batch_size=flags.batch_size,
        tries=flags.tries,
    )
    begun = time.perf_counter()
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        row_bar = bar.add_task("rejects", total=len(tasks))
        tally = fill(
            model,
            tokenizer,
            tasks,
            RejectFile(flags.output_csv, columns, made_by(flags, settings)),
            settings,
            overwrite=flags.overwrite,
            progress=lambda rows: bar.update(row_bar, completed=rows),
        )
    if tally.resumed == len(tasks):
        log.info("%s had every row already; remove it, or use --overwrite 1, to sample again", flags.output_csv)
        return
    skipped = [f"{count} rows left out: {reason}" for reason, count in report.skipped.items()]
    for line in [*tally.lines(), *skipped]:
        log.info("%s", line)
    log.info("wrote %d rows to %s in %.1f s", len(tasks), flags.output_csv, time.perf_counter() - begun)
