"""Compare two answers to each prompt in the browser, and get preference pairs that train.py reads.

python label.py --load_model M --prompt_file prompts.jsonl --output pairs.jsonl
python label.py --load_model M --compare other.pth --prompt_file prompts.jsonl --output pairs.jsonl

The page is on this machine only, under an address that holds a token. Every vote is on the disk before the next pair is
shown; the same command goes on where it was stopped. With --compare each model gives one answer, which of them is not
shown, and the end says how often the first one was better.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.named_model import named_model
from rwkv_rlhf.commands.flag_values import flags_of, opened_model, reading_of, trained_template
from rwkv_rlhf.commands.parsers.label import parser
from rwkv_rlhf.data.asking import waiting_turns
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import content_of, refuse_sources
from rwkv_rlhf.data.templates.template import TEMPLATES, Template
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.generation.opening import storage_of
from rwkv_rlhf.generation.sampling_params import SamplingParams, options, sampling_params
from rwkv_rlhf.reports.words import command, pasted
from rwkv_rlhf.settings.optional import require
from rwkv_rlhf.settings.shapes import KINDS

log = logging.getLogger("label")


def hash_of(flags: Namespace) -> list[str]:
    """What tells a model from others: the hashes of its files, and how it is stored."""
    if Path(flags.load_model).is_dir() and not flags.load_adapter:
        named = named_model(flags.load_model)
        files = [named.base, *([named.adapter] if named.adapter else [])]
    else:
        files = [Path(name) for name in (flags.load_model, flags.load_adapter) if name]
    return [*map(file_hash, files), storage_of(flags.strategy, flags.quant_mode)]


def prompts_of(flags: Namespace) -> list[tuple[Turn, ...]]:
    """The conversations of --prompt_file. Raises ValueError."""
    if not flags.prompt_file:
        return []
    refuse_sources(flags.prompt_file, flags.output, "--output")
    report, reading = DataReport(flags.prompt_file), dataclasses.replace(reading_of(flags), spare_reject=True)
    found = [waiting_turns(row) for row in read_items(flags.prompt_file, report, tuple(KINDS), reading)]
    for line in report.found:
        log.info("%s", line)
    if not found:
        raise ValueError(f"{flags.prompt_file} has no prompt")
    return found


def about(flags: Namespace, sides: Sequence[Namespace]) -> dict[str, Any]:
    """What the votes of one file have in common, as its first line says it."""
    template = flags.template if flags.template in ("", *TEMPLATES) else file_hash(flags.template)
    return {
        "models": [hash_of(side) for side in sides],
        "prompts": content_of(flags.prompt_file) if flags.prompt_file else "",
        "reading": [flags.format, flags.thinking],
        "template": template,
        "sampling": {field.name: getattr(flags, field.name) for field in options()},
    }


def main(words: Sequence[str]) -> None:
    """Serves the page until it is stopped, then says what came of it."""
    flags = parser().parse_args(words)
    require("label", "starlette", "uvicorn")
    if flags.ahead < 0:
        raise ValueError(f"--ahead {flags.ahead}: must be at least 0")
    template = trained_template(flags)
    params = sampling_params(flags, stop_texts=template.stop_texts)
    prompts = prompts_of(flags)
    sides = [flags, flags_of(flags, flags.compare)] if flags.compare else [flags]
    serve(flags, sides, template, params, prompts)


def serve(
    flags: Namespace,
    sides: Sequence[Namespace],
    template: Template,
    params: SamplingParams,
    prompts: Sequence[tuple[Turn, ...]],
) -> None:
    """The work itself."""
    from rwkv_rlhf.serving.engine import Engine
    from rwkv_rlhf.serving.label_app import LabelApp
    from rwkv_rlhf.serving.labelling import Labelling
    from rwkv_rlhf.serving.votes import VoteFile
    from rwkv_rlhf.serving.web import address, bound, run_app

    with bound("127.0.0.1", flags.port) as listener:
        votes = VoteFile(Path(flags.output), about(flags, sides))
        engines = [Engine(*opened_model(side), at_once=2 * (flags.ahead + 1)) for side in sides]
        names = [Path(side.load_adapter or side.load_model).stem for side in sides]
        if len({*names}) < len(names):
            names = [flags.load_adapter or flags.load_model, flags.compare]
        work, token = Labelling(engines, template, params, prompts, votes, flags.ahead), secrets.token_urlsafe(24)
        print(f"open {address(listener)}/?token={token} in a browser (Ctrl+C ends)", flush=True)
        try:
            run_app(LabelApp(work, names).application(token), listener)
        finally:
            for engine in engines:
                engine.close()
            for line in work.lines(names):
                print(line)
            print(next_step(flags, votes.made()), flush=True)


def next_step(flags: Namespace, pairs: int) -> str:
    """What to do with the pairs, to paste; without any, how to go on."""
    if not pairs:
        return f"{flags.output} has no pair yet: the same command goes on"
    words = ["--load_model", flags.load_model, "--dpo", "1", "--rlhf_train_file", flags.output, "--peft", "lora"]
    told = {"--vocab_file": flags.vocab_file, "--template": flags.template}
    words += [word for flag, value in told.items() if value for word in (flag, value)]
    return f"pairs for training: {flags.output}\nnext: {command('train')} {pasted(words)} --val_split 0.1"
