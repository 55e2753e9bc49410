"""Talk to a model, or let it answer a file of prompts.

With --prompt_file IN.jsonl (objects with `prompt`, optionally `system`) and --output OUT.jsonl each line of the output
is {"prompt", "answer", "tokens", "logprobs"}: `tokens` are the sampled ids, those that ended the answer included;
`logprobs` the natural-log probability of each under the model itself (temperature 1, nothing cut or penalised).
Without --prompt_file: a conversation. /help lists its commands.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_rlhf.checkpoints.adapter_files import hinting
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import read_jsonl
from rwkv_rlhf.data.templates.builtin import TEMPLATES, Form, Turn, normalise
from rwkv_rlhf.data.templates.named import forms_of
from rwkv_rlhf.files import atomic_write, check_writable, refuse_same_file
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.generation.sampling import Generated, generate
from rwkv_rlhf.settings.command_line import Parser

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

HELP = """/reset       forget the conversation
/temp X      temperature (0 = always the likeliest token)
/top_p X     share of the distribution to pick from
/max N       longest answer in tokens
/help        this list
/quit        leave (also Ctrl+D)"""


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Talk to a model, or let it answer a file of prompts.")
    flags.add_argument("--load_model", required=True, help="checkpoint of the model")
    flags.add_argument("--load_adapter", default="", help="adapter checkpoint laid over it")
    flags.add_argument("--lora_scaling", type=float, help="its alpha / rank, needed when there is no .json beside it")
    flags.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    flags.add_argument("--load_adapter_pissa_init", default="", help="its PiSSA factors, if they are not beside it")
    flags.add_argument("--load_cold_adapter", default="", help="adapter merged below it, if it is not where it was")
    flags.add_argument("--prompt_file", default="", help="JSONL of prompts; empty = talk")
    flags.add_argument("--output", default="", help="JSONL of answers to write (with --prompt_file)")
    flags.add_argument("--strategy", default="auto", help="device and precision, e.g. 'cuda bf16' or 'cpu fp32' [auto]")
    flags.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token [1.0]")
    flags.add_argument("--top_p", type=float, default=0.7, help="share of the distribution to pick from [0.7]")
    flags.add_argument("--top_k", type=int, default=0, help="number of tokens to pick from; 0 = all [0]")
    flags.add_argument("--presence", type=float, default=0.0, help="penalty on tokens that were there [0]")
    flags.add_argument("--frequency", type=float, default=0.0, help="penalty per occurrence [0]")
    flags.add_argument("--max_tokens", type=int, default=512, help="longest answer in tokens [512]")
    flags.add_argument("--batch_size", type=int, default=32, help="prompts of a file answered together [32]")
    flags.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)}, or a Jinja file [world]")
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")
    return flags


def options(flags: Any, form: Form) -> dict[str, Any]:
    """Arguments of `generate` that follow from the flags."""
    return {
        "max_tokens": flags.max_tokens,
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "top_k": flags.top_k,
        "presence": flags.presence,
        "frequency": flags.frequency,
        "stop_texts": (form.end,) if form.end else (),
    }


def cue(record: dict, form: Form, where: str) -> str:
    """The text that an answer to this record follows. Raises ValueError, with file and line, without a prompt."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: an object with a text under prompt is needed")
    if not form.assistant:
        return prompt  # plain text is continued byte for byte
    system = record.get("system")
    turns = [("system", normalise(system))] if isinstance(system, str) and system.strip() else []
    return form.prompt([*turns, ("user", normalise(prompt))])


def answer_file(flags: Any, form: Form, load: Callable[[], tuple]) -> None:
    """Answers every prompt of --prompt_file; the output appears when all are answered."""
    refuse_same_file(flags.prompt_file, flags.output, "--output")
    records = list(read_jsonl(flags.prompt_file, DataReport(flags.prompt_file)))
    cues = [cue(record, form, where) for where, record in records]
    if not cues:
        raise ValueError(f"{flags.prompt_file} has no prompt")
    check_writable(flags.output)
    model, tokenizer = load()
    answers: list[Generated] = []
    for begin in range(0, len(cues), flags.batch_size):
        some = [tokenizer.encode(text) for text in cues[begin : begin + flags.batch_size]]
        seeds = [flags.seed + begin + row for row in range(len(some))]
        answers += generate(model, some, seed=seeds, tokenizer=tokenizer, **options(flags, form))
    with atomic_write(flags.output) as file:
        for (_, record), one in zip(records, answers, strict=True):
            answer = one.text.strip() if form.assistant else one.text
            line = {"prompt": record["prompt"], "answer": answer, "tokens": one.tokens, "logprobs": one.logprobs}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", errors="replace"))
    cut = sum(not one.finished for one in answers)
    log.info("%d answers written to %s%s", len(answers), flags.output, f", {cut} cut at --max_tokens" if cut else "")


class Stream:
    """Prints an answer as its tokens come, without the mark that ends it."""

    def __init__(self, tokenizer, end: str) -> None:
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

    def __init__(self, flags: Any, form: Form, model, tokenizer) -> None:
        self.flags, self.form, self.model, self.tokenizer = flags, form, model, tokenizer
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.pending = None, []
        self.said: list[Turn] = []

    def say(self, text: str) -> None:
        """One turn of the user, and the answer on stdout."""
        self.turns += 1
        turns = [("user", text)]
        if self.form.whole:  # such a template writes a conversation, not a turn of it: the model reads it again
            turns = [*self.said, *turns]
            self.state, self.pending = None, []
        prompt = self.pending + self.tokenizer.encode(self.form.prompt(turns))
        one = generate(
            self.model,
            [prompt],
            seed=self.flags.seed + self.turns,
            tokenizer=self.tokenizer,
            state=self.state,
            keep_state=True,
            on_token=Stream(self.tokenizer, self.form.end),
            **options(self.flags, self.form),
        )[0]
        self.state = one.state
        self.said = [*turns, ("assistant", one.text.strip())]
        self.pending = one.tokens[-1:] + ([] if one.finished else self.tokenizer.encode(self.form.end))
        sys.stdout.write("\n\n")

    def command(self, line: str) -> bool:
        """A line that begins with a slash; False to leave."""
        word, _, value = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.reset()
        elif word in SETTINGS:
            name, kind = SETTINGS[word]
            setattr(self.flags, name, kind(value))
        else:
            sys.stdout.write(HELP + "\n")
        return True


SETTINGS = {"/temp": ("temperature", float), "/top_p": ("top_p", float), "/max": ("max_tokens", int)}


def talk(flags: Any, form: Form, load: Callable[[], tuple]) -> None:
    """Reads lines and answers them until /quit or the end of the input."""
    conversation = Talk(flags, form, *load())
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
    if min(flags.max_tokens, flags.batch_size) < 1:
        raise ValueError("--max_tokens and --batch_size must be at least 1")
    form = forms_of(flags.template)[0][1]

    said = {"scaling": flags.lora_scaling, "alpha": flags.lora_alpha}
    if not flags.load_adapter and any(value is not None for value in said.values()):
        raise ValueError("--lora_scaling and --lora_alpha need --load_adapter")
    said |= {"initial_file": flags.load_adapter_pissa_init, "cold": flags.load_cold_adapter}

    def load() -> tuple:
        with hinting(HINTS):
            return open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file, **said)

    (answer_file if flags.prompt_file else talk)(flags, form, load)
