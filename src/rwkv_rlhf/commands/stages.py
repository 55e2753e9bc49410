"""From the words of a neural_chat script to those of our command; the spellings are `settings/pipeline.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rwkv_rlhf.commands import train
from rwkv_rlhf.settings.command_line import Parser, UsageError
from rwkv_rlhf.settings.elsewhere import Translated, translate
from rwkv_rlhf.settings.pipeline import STAGES, Stage

log = logging.getLogger(__name__)

HELP = ("-h", "--help", "--version")


def words_of(stage: Stage, words: Sequence[str]) -> Translated:
    """`words` as our command takes them, behind the script's defaults. Raises ValueError for what is refused."""
    found = translate(words, stage.spellings)
    new, said = own_vocabulary(found.words)
    chosen = "--layer_profile" in new or value_of(new, "--peft") not in ("", "lora")
    defaults = f"{stage.words} {'' if chosen else stage.adapter}"
    return Translated([*defaults.split(), *new], [*found.said, *said])


def value_of(words: Sequence[str], flag: str) -> str:
    """What is typed behind `flag`, "" where it is not there."""
    return next((value for at, value in pairwise(words) if at == flag), "")


def own_vocabulary(words: list[str]) -> Translated:
    """--vocab_file of a folder is the tokenizer.json in it; without one it is left out, and World is meant."""
    folder = Path(value_of(words, "--vocab_file") or "no folder")
    if not folder.is_dir():
        return Translated(words, [])
    at, file = words.index("--vocab_file"), folder / "tokenizer.json"
    put = ["--vocab_file", str(file)] if file.is_file() else []
    return Translated([*words[:at], *put, *words[at + 2 :]], [f"{folder}: {' '.join(put) or 'the World vocabulary'}"])


def stage_help(stage: Stage) -> Parser:
    """A parser that knows the spellings of a stage only, for --help and --version."""
    parser = Parser(f"{stage.help} Every flag of the other command is taken too.")
    about: dict[str, list[str]] = {}
    for entry in stage.spellings:
        flag, _, value = entry.said.partition(" ")
        here = "refused" if entry.ours is None else f"--{entry.ours}" if entry.ours else "no effect"
        shown = f"{value}: " if value not in ("", "X") else ""
        about.setdefault(flag, []).append(f"{shown}{here}" + (f" ({entry.note})" if entry.note else ""))
    for flag, texts in about.items():
        parser.add_argument(f"--{flag}", metavar="X", help="; ".join(texts).replace("%", "%%"))
    return parser


def translated(name: str, words: Sequence[str], say: bool = True) -> list[str]:
    """The words of our command for those of the script `name`; says what was spelled otherwise. Raises UsageError."""
    stage = STAGES[name]
    if any(word in HELP for word in words):
        stage_help(stage).parse_args([word for word in words if word in HELP])
    try:
        found = words_of(stage, words)
    except ValueError as mistake:
        raise UsageError(str(mistake)) from mistake
    if found.said and say:
        log.info("spelled as in neural_chat: %s", "; ".join(found.said))
    return found.words


def run_stage(name: str, words: Sequence[str]) -> int | None:
    """Trains as the script `name` would. Returns the exit status."""
    return train.main(translated(name, words))
