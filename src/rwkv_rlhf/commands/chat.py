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
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_rlhf.checkpoints.adapter_files import hinting
from rwkv_rlhf.commands.flag_values import ADAPTER_HINTS, adapter_flags, reading_of
from rwkv_rlhf.commands.parsers.chat import parser
from rwkv_rlhf.commands.several import several
from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.items import Found, read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.record import Chat, Document
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import atomic_write, check_writable, without_nan
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import (
    SamplingParams,
    option_types,
    options,
    sampling_params,
)
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.settings.command_line import TYPE_WORDS
from rwkv_rlhf.settings.formats import refuse_other_format
from rwkv_rlhf.settings.shapes import KINDS

log = logging.getLogger("chat")

SHORT = {"/temp": "temperature", "/max": "max_tokens"}  # the other options by their names: /top_p 0.5


def cue(found: Found, template: Template) -> str:
    """The text that an answer to this row follows: of a chat, its words before the last answer."""
    prompt = found.record.get("prompt")
    if not template.assistant and isinstance(prompt, str):
        return prompt  # plain text is continued byte for byte
    if isinstance(found.item, Document):
        raise ValueError(f"{found.where}: this is a document, and prompts are needed")
    turns = found.item.turns
    if isinstance(found.item, Chat):
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        turns = turns[: answers[-1]] if answers and answers[-1] == len(turns) - 1 else turns
    return template.prompt(turns)


def asked(found: Found) -> Any:
    """The prompt as the output repeats it: as it stands in the row, or the messages before the answer."""
    if isinstance(found.record.get("prompt"), str):
        return found.record["prompt"]
    assert not isinstance(found.item, Document)
    return [{"role": turn.role, "content": turn.text} for turn in found.item.turns]


def answer_file(
    flags: Namespace, template: Template, params: SamplingParams, load: Callable[[], tuple[RWKV, Tokenizer]]
) -> None:
    """Answers every prompt of --prompt_file; the output appears when all are answered."""
    refuse_sources(flags.prompt_file, flags.output, "--output")
    refuse_other_format(flags.output, "--output", "jsonl")
    report, reading = DataReport(flags.prompt_file), dataclasses.replace(reading_of(flags), spare_reject=True)
    rows = list(read_items(flags.prompt_file, report, tuple(KINDS), reading))
    cues = [cue(row, template) for row in rows]
    for line in report.found:
        log.info("%s", line)
    if not cues:
        raise ValueError(f"{flags.prompt_file} has no prompt")
    check_writable(flags.output)
    model, tokenizer = load()
    mine = range(ranks.rank(), len(cues), ranks.world_size())
    prompts = [template.ids(cues[row], tokenizer) for row in mine]
    seeds = [params.seed + row for row in mine]
    found = Sampler(model, tokenizer).generate(prompts, params, seeds=seeds, at_once=flags.batch_size)
    by_row = {row: one for part in ranks.all_gather(dict(zip(mine, found, strict=True))) for row, one in part.items()}
    if not ranks.is_rank_zero():
        return
    answers = [by_row[row] for row in range(len(cues))]
    with atomic_write(flags.output) as file:
        for row, one in zip(rows, answers, strict=True):
            answer = one.text.strip() if template.assistant else one.text
            said = {"prompt": asked(row), "answer": answer, "tokens": one.tokens, "logprobs": one.logprobs}
            line = json.dumps(without_nan(said), ensure_ascii=False, allow_nan=False)
            file.write(f"{line}\n".encode(errors="replace"))
    cut = sum(1 for one in answers if not one.finished)
    log.info("%d answers written to %s%s", len(answers), flags.output, f", {cut} cut at --max_tokens" if cut else "")


class Stream:
    """Prints an answer as its tokens come, without the mark that ends it."""

    def __init__(self, tokenizer: Tokenizer, end: str) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, sample: int, token: int) -> bool:
        """One more token; bytes of a character that is not whole yet wait."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if self.end:
            text = text.split(self.end)[0].rstrip(self.end[0])
        text = text.rstrip("\ufffd").lstrip()
        if text.startswith(self.shown):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text
        return True


class Talk:
    """A conversation: the state after what was said, and the tokens that the model has not seen yet."""

    def __init__(self, template: Template, params: SamplingParams, model: RWKV, tokenizer: Tokenizer) -> None:
        self.template, self.params = template, params
        self.sampler, self.tokenizer = Sampler(model, tokenizer), tokenizer
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: State | None = None
        self.pending: list[int] = []
        self.said: list[Turn] = []

    def say(self, text: str) -> None:
        """One turn of the user, and the answer on stdout."""
        self.turns += 1
        turns = [Turn("user", text)]
        if self.template.whole_conversation:  # it cannot write one turn alone, so the model reads all of them again
            turns = [*self.said, *turns]
            self.state, self.pending = None, []
        prompt = self.pending + self.template.ids(self.template.prompt(turns), self.tokenizer)
        one = self.sampler.generate(
            [prompt],
            self.params,
            seeds=[self.params.seed + self.turns],
            state=self.state,
            keep_state=True,
            hear=Stream(self.tokenizer, self.template.end),
        )[0]
        self.state = one.state
        self.said = [*turns, Turn("assistant", one.text.strip())]
        self.pending = one.tokens[-1:] + ([] if one.finished else self.template.ids(self.template.end, self.tokenizer))
        sys.stdout.write("\n\n" if one.finished else f"\n(cut at /max {self.params.max_tokens})\n\n")

    def command(self, line: str) -> bool:
        """A line that begins with a slash; False to leave."""
        word, _, value = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.reset()
        elif (name := SHORT.get(word, word[1:])) in option_types():
            typed: dict[str, Any] = {name: number(word, value, option_types()[name])}
            self.params = dataclasses.replace(self.params, **typed)
        else:
            sys.stdout.write(help_text())
        return True


def number(word: str, text: str, kind: type) -> Any:
    """What is typed behind a command; ValueError, in a sentence, for what is no number."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{word} {text!r}: expected {TYPE_WORDS[kind]}") from None


def help_text() -> str:
    """The commands of a conversation."""
    short = {name: word for word, name in SHORT.items()}
    lines = {"/reset": "forget the conversation"}
    lines |= {f"{short.get(o.name, f'/{o.name}')} X": o.metadata["help"] for o in options()}
    lines |= {"/help": "this list", "/quit": "leave (also Ctrl+D)"}
    return "".join(f"{word:18}{text}\n" for word, text in lines.items())


def talk(template: Template, params: SamplingParams, load: Callable[[], tuple[RWKV, Tokenizer]]) -> None:
    """Reads lines and answers them until /quit or the end of the input."""
    conversation = Talk(template, params, *load())
    sys.stdout.write("/help lists the commands, Ctrl+D leaves.\n\n")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    return
            elif line:
                conversation.say(normalise(line))
        except ValueError as mistake:
            sys.stdout.write(f"{mistake}\n")
        except KeyboardInterrupt:
            sys.stdout.write("\n(stopped; this turn is forgotten)\n")


def main(argv: Sequence[str]) -> None:
    """Answers a file, or talks."""
    flags = parser().parse_args(argv)
    if bool(flags.prompt_file) != bool(flags.output):
        raise ValueError("--prompt_file and --output go together")
    if flags.batch_size < 1:
        raise ValueError(f"--batch_size {flags.batch_size}: must be at least 1")
    template = find_templates(flags.template)[0].template
    params = sampling_params(flags, stop_texts=(template.end,) if template.end else ())

    known = adapter_flags(flags)
    said: dict[str, Any] = {"scaling": known.scaling, "alpha": known.alpha}
    said |= {"initial_file": flags.load_adapter_pissa_init, "cold": flags.load_cold_adapter}

    def load() -> tuple[RWKV, Tokenizer]:
        with hinting(ADAPTER_HINTS):
            return open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file, **said)

    if flags.prompt_file:
        with several(flags, "chat", argv):
            answer_file(flags, template, params, load)
    elif (flags.devices or 1) > 1:
        raise ValueError(f"--devices {flags.devices}: a conversation runs in one process; it is for --prompt_file")
    else:
        talk(template, params, load)
