"""Talk to a model, or let it answer a file of prompts.

With --prompt_file IN.jsonl (objects with `prompt`, optionally `system`) and --output OUT.jsonl each line of the output
is {"prompt", "answer", "tokens", "logprobs"}: `tokens` are the sampled ids, those that ended the answer included;
`logprobs` the natural-log probability of each under the model itself (temperature 1, nothing cut or penalised).
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
from rwkv_rlhf.commands.flag_groups import add_model_flags, add_text_flags
from rwkv_rlhf.data.conversation import Turn, normalise, with_system
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import read_jsonl
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import atomic_write, check_writable, refuse_same_file
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.generation.sampler import Completion, Sampler
from rwkv_rlhf.generation.sampling_params import (
    SamplingParams,
    add_sampling_flags,
    option_types,
    options,
    sampling_params,
)
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.settings.command_line import Parser
from rwkv_rlhf.settings.formats import refuse_other_format

log = logging.getLogger("chat")

# what to do about a mismatch of model, adapter and flags
HINTS = {
    "base": "give the right --load_model",
    "scaling": "leave --lora_scaling out",
    "alpha": "leave --lora_alpha out",
    "factors": "give them with --load_adapter_pissa_init",
    "cold": "--load_cold_adapter must name what was merged below it, or be left out",
    "no scaling": "--lora_scaling (alpha / rank) or --lora_alpha",
}

SHORT = {"/temp": "temperature", "/max": "max_tokens"}  # the other options by their names: /top_p 0.5


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Talk to a model, or let it answer a file of prompts.")
    add_model_flags(flags, "checkpoint of the model")
    flags.add_argument("--lora_scaling", type=float, help="its alpha / rank, needed when there is no .json beside it")
    flags.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    flags.add_argument("--load_adapter_pissa_init", default="", help="its PiSSA factors, if they are not beside it")
    flags.add_argument("--load_cold_adapter", default="", help="adapter merged below it, if it is not where it was")
    flags.add_argument("--prompt_file", default="", help="JSONL of prompts; empty = talk")
    flags.add_argument("--output", default="", help="JSONL of answers to write (with --prompt_file)")
    add_sampling_flags(flags, top_p=0.7)
    flags.add_argument("--batch_size", type=int, default=32, help="prompts of a file answered in one batch [32]")
    add_text_flags(flags)
    return flags


def cue(record: dict[str, Any], template: Template, where: str) -> str:
    """The text that an answer to this record follows. Raises ValueError, with file and line, without a prompt."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: an object with a text under prompt is needed")
    if not template.assistant:
        return prompt  # plain text is continued byte for byte
    return template.prompt(with_system([Turn("user", normalise(prompt))], record.get("system")))


def answer_file(
    flags: Namespace, template: Template, params: SamplingParams, load: Callable[[], tuple[RWKV, Tokenizer]]
) -> None:
    """Answers every prompt of --prompt_file; the output appears when all are answered."""
    refuse_same_file(flags.prompt_file, flags.output, "--output")
    refuse_other_format(flags.output, "--output", "jsonl")
    records = list(read_jsonl(flags.prompt_file, DataReport(flags.prompt_file)))
    cues = [cue(record, template, where) for where, record in records]
    if not cues:
        raise ValueError(f"{flags.prompt_file} has no prompt")
    check_writable(flags.output)
    model, tokenizer = load()
    sampler, answers = Sampler(model, tokenizer), list[Completion]()
    for begin in range(0, len(cues), flags.batch_size):
        some = [tokenizer.encode(text) for text in cues[begin : begin + flags.batch_size]]
        seeds = [params.seed + begin + row for row in range(len(some))]
        answers += sampler.generate(some, params, seeds=seeds)
    with atomic_write(flags.output) as file:
        for (_, record), one in zip(records, answers, strict=True):
            answer = one.text.strip() if template.assistant else one.text
            line = {"prompt": record["prompt"], "answer": answer, "tokens": one.tokens, "logprobs": one.logprobs}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", errors="replace"))
    cut = sum(1 for one in answers if not one.finished)
    log.info("%d answers written to %s%s", len(answers), flags.output, f", {cut} cut at --max_tokens" if cut else "")


class Stream:
    """Prints an answer as its tokens come, without the mark that ends it."""

    def __init__(self, tokenizer: Tokenizer, end: str) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, sequence: int, token: int) -> None:
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
        prompt = self.pending + self.tokenizer.encode(self.template.prompt(turns))
        one = self.sampler.generate(
            [prompt],
            self.params,
            seeds=[self.params.seed + self.turns],
            state=self.state,
            keep_state=True,
            on_token=Stream(self.tokenizer, self.template.end),
        )[0]
        self.state = one.state
        self.said = [*turns, Turn("assistant", one.text.strip())]
        self.pending = one.tokens[-1:] + ([] if one.finished else self.tokenizer.encode(self.template.end))
        sys.stdout.write("\n\n" if one.finished else f"\n(cut at /max {self.params.max_tokens})\n\n")

    def command(self, line: str) -> bool:
        """A line that begins with a slash; False to leave."""
        word, _, value = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.reset()
        elif (name := SHORT.get(word, word[1:])) in option_types():
            self.params = dataclasses.replace(self.params, **{name: option_types()[name](value)})
        else:
            sys.stdout.write(help_text())
        return True


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

    said = {"scaling": flags.lora_scaling, "alpha": flags.lora_alpha}
    if not flags.load_adapter and any(value is not None for value in said.values()):
        raise ValueError("--lora_scaling and --lora_alpha need --load_adapter")
    said |= {"initial_file": flags.load_adapter_pissa_init, "cold": flags.load_cold_adapter}

    def load() -> tuple[RWKV, Tokenizer]:
        with hinting(HINTS):
            return open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file, **said)

    if flags.prompt_file:
        answer_file(flags, template, params, load)
    else:
        talk(template, params, load)
