"""Talk to a model, or let it answer a file of prompts.

With --prompt_file IN (rows with `prompt`, or of any other shape of docs/data.md, of which the last answer is left out)
and --output OUT.jsonl each line of the output is {"prompt", "answer", "tokens", "logprobs"}: `tokens` are the sampled
ids, those that ended the answer included; `logprobs` the natural-log probability of each under the model itself
(temperature 1, nothing cut or penalised).
Without --prompt_file: a conversation. /help lists its commands.
"""

import dataclasses
import json
import logging
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.commands.conversation import Talk, Voice, help_text
from rwkv_rlhf.commands.flag_values import flags_of, opened_model, reading_of
from rwkv_rlhf.commands.parsers.chat import parser
from rwkv_rlhf.commands.screen import check_history, line_reader, screen_of
from rwkv_rlhf.commands.several import several
from rwkv_rlhf.data.asking import waiting_turns
from rwkv_rlhf.data.conversation import normalise
from rwkv_rlhf.data.items import Found, read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.record import Document
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import atomic_write, check_writable, fingerprint, without_nan
from rwkv_rlhf.generation.opening import storage_of
from rwkv_rlhf.generation.part_files import PartFiles
from rwkv_rlhf.generation.rows import Completion, Request
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams, sampling_params
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.precision import NAMES, parse_strategy
from rwkv_rlhf.settings.hub import local
from rwkv_rlhf.settings.shapes import KINDS
from rwkv_rlhf.settings.tables import DENSE

log = logging.getLogger("chat")


def cue(found: Found, template: Template) -> str:
    """The text that an answer to this row follows: of a chat, its words before the last answer."""
    prompt = found.record.get("prompt")
    if not template.assistant and isinstance(prompt, str):
        return prompt  # plain text is continued byte for byte
    return template.prompt(waiting_turns(found))


def asked(found: Found) -> Any:
    """The prompt as the output repeats it: as it stands in the row, or the messages before the answer."""
    if isinstance(found.record.get("prompt"), str):
        return found.record["prompt"]
    assert not isinstance(found.item, Document)
    return [{"role": turn.role, "content": turn.text} for turn in found.item.turns]


def answers_depend_on(flags: Namespace) -> dict[str, Any]:
    """The flags that answers follow from; a file by what tells it from others."""
    rest = ("output", "batch_size", "devices", "prompt_file", "history")
    values = {name: value for name, value in vars(flags).items() if name not in rest}
    return {
        name: fingerprint(value) if isinstance(value, str) and value and Path(value).is_file() else value
        for name, value in values.items()
    }


def answer_file(flags: Namespace, template: Template, params: SamplingParams) -> None:
    """Answers every prompt of --prompt_file; the output appears when all are answered. Until then answers are kept
    beside it, and the same command goes on with them."""
    refuse_sources(flags.prompt_file, flags.output, "--output")
    report, reading = DataReport(flags.prompt_file), dataclasses.replace(reading_of(flags), spare_reject=True)
    rows = list(read_items(flags.prompt_file, report, tuple(KINDS), reading))
    cues = [cue(row, template) for row in rows]
    for line in report.found:
        log.info("%s", line)
    if not cues:
        raise ValueError(f"{flags.prompt_file} has no prompt")
    check_writable(flags.output)
    model, tokenizer = opened_model(flags)
    parts = PartFiles(Path(flags.output), [answers_depend_on(flags), cues])
    known: dict[int, Any] = ranks.broadcast_from_zero(parts.found)
    if known:
        log.info("%d answers are there from a run that was stopped", len(known))
    queue = deque(
        Request(template.ids(cues[row], tokenizer), params, sequence_seed(params.seed + row, 0), row)
        for row in [row for row in range(len(cues)) if row not in known][ranks.rank() :: ranks.world_size()]
    )
    part = parts.of(ranks.rank())
    for done in Sampler(model, tokenizer).stream(queue, at_once=flags.batch_size):
        known[done.request.key] = dataclasses.asdict(done.completion)
        part.append(done.request.key, known[done.request.key])
    by_row = {row: one for part in ranks.all_gather(known) for row, one in part.items()}
    if not ranks.is_rank_zero():
        return
    answers = [Completion(**by_row[row]) for row in range(len(cues))]
    with atomic_write(flags.output) as file:
        for row, one in zip(rows, answers, strict=True):
            answer = one.text.strip() if template.assistant else one.text
            said = {"prompt": asked(row), "answer": answer, "tokens": one.tokens, "logprobs": one.logprobs}
            line = json.dumps(without_nan(said), ensure_ascii=False, allow_nan=False)
            file.write(f"{line}\n".encode(errors="replace"))
    parts.remove()
    cut = sum(1 for one in answers if not one.finished)
    log.info("%d answers written to %s%s", len(answers), flags.output, f", {cut} cut at --max_tokens" if cut else "")


def talk(flags: Namespace, params: SamplingParams, load: Callable[[str], tuple[RWKV, Tokenizer]]) -> None:
    """Reads lines and answers them until /quit or the end of the input."""
    check_history(flags.history)
    paths = [flags.load_model, *([flags.compare] if flags.compare else [])]
    names = [Path(flags.load_adapter or flags.load_model).stem, *(Path(path).stem for path in paths[1:])]
    voices = [Voice(name, *load(path)) for name, path in zip(names, paths, strict=True)]
    choice = parse_strategy(flags.strategy)
    store = storage_of(flags.strategy, flags.quant_mode)
    about = f", {choice.device} {NAMES[choice.dtype]}" + (f", {store}" if store != DENSE else "")
    conversation = Talk(flags.template, params, voices, screen_of(names), load, about)
    sys.stdout.write(f"{conversation.settings()}/help lists the commands, Ctrl+C stops an answer, Ctrl+D leaves.\n\n")
    read, pressed = line_reader(flags.history, [word.split()[0] for word in help_text().splitlines()]), 0
    while True:
        try:
            line = read().strip()
            pressed = 0
            told = answered(conversation, line)
            if told is None:
                return
            sys.stdout.write(told)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            pressed += 1
            if pressed > 1:
                raise
            sys.stdout.write("\n(Ctrl+C again, or Ctrl+D, leaves)\n")


def answered(conversation: Talk, line: str) -> str | None:
    """What a line brings about: the text to show behind the answer, None to leave."""
    try:
        if line.startswith("/"):
            return conversation.command(line)
        if line:
            conversation.say(normalise(line))
    except ValueError as mistake:
        return f"{mistake}\n"
    except KeyboardInterrupt:
        return "\n(stopped; this turn is forgotten)\n"
    return ""


def main(argv: Sequence[str]) -> None:
    """Answers a file, or talks."""
    flags = parser().parse_args(argv)
    template = find_templates(flags.template)[0].template
    params = sampling_params(flags, stop_texts=template.stop_texts)

    def load(path: str) -> tuple[RWKV, Tokenizer]:
        return opened_model(flags if path == flags.load_model else flags_of(flags, local(path)))

    if flags.prompt_file:
        with several(flags, "chat", argv):
            answer_file(flags, template, params)
    else:
        talk(flags, params, load)
