"""Every command: `python <script>.py`, `rwkv-rlhf <command>` and `python -m rwkv_rlhf <command>` are the same.

A command is one file with `main(words)`, which takes the words behind its name and returns an exit status or None for
0, and an entry in `COMMANDS`; the script at the top level calls `run_command`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from rwkv_rlhf.commands.old_scripts import OLD_SCRIPTS, translated
from rwkv_rlhf.settings.command_line import Parser, run
from rwkv_rlhf.settings.config import PROGRAM, PROGRAM_VERSION
from rwkv_rlhf.settings.given_files import check_path
from rwkv_rlhf.settings.hub import local_words
from rwkv_rlhf.settings.surroundings import loading, one_of_several


class Command(NamedTuple):
    """The scripts at the top level that run a command (the first is its usual name), if any, and what it does."""

    scripts: tuple[str, ...]
    help: str


COMMANDS = {
    "train": Command(("train",), "train a model: pre-training, SFT, DPO, ORPO, distillation and more"),
    "merge": Command(
        ("merge", "merge_lora", "merge_bone", "merge_disha", "merge_pissa", "merge_state"),
        "make one model of a base model and a checkpoint of training; PEFT and back",
    ),
    "export": Command(("export",), "write a model for llama.cpp, Hugging Face and other programs"),
    "chat": Command(("chat",), "talk to a model, or let it answer a file of prompts"),
    "serve": Command(("serve",), "answer chat clients that speak OpenAI's API"),
    "label": Command(("label",), "compare answers in the browser: preference pairs, a blind test of two models"),
    "score": Command(("score",), "let a reward model score a file of answers"),
    "generate_rejects": Command(
        ("rlhf_generate_reject_csv", "rlhf_generate_reject"), "sample the answers that are to be rejected"
    ),
    "score_pairs": Command(("rlhf_dpo_generate_save",), "tokenise preference pairs with reference scores, for DPO"),
    "prepare_pairs": Command(("PrepareOrpoDataset", "rlhf_generate_save"), "tokenise preference pairs, for ORPO"),
    "sft_h5": Command(("sft_generate_h5",), "tokenise documents and chats into an .h5"),
    "distillation_h5": Command(("distillation_generate_h5",), "write a teacher's largest logits into an .h5"),
    "convert": Command(("convert_data",), "write data of any shape as one JSON object a line"),
    "make_binidx": Command(("make_binidx", "make_data"), "tokenise documents into a binidx corpus"),
    "make_profile": Command(("make_profile",), "write a layer profile to start from"),
    "finetune_clm": Command(("finetune_clm",), "neural_chat's first stage: supervised fine-tuning"),
    "reward_modeling": Command(("reward_modeling",), "neural_chat's second stage: a reward model"),
    "rl_training": Command(("rl_training",), "neural_chat's third stage: PPO"),
    "merge_peft_adapter": Command(("merge_peft_adapter",), "neural_chat's merging, between its stages"),
    "report": Command((), "write the page of a run again, or one page that compares several runs"),
    "config": Command((), "check the settings of a run, print them as a file for --config, or their JSON schema"),
}
PARSERS = "rwkv_rlhf.commands.parsers"  # a module for each command that has flags of its own
NAMED = {word: name for name, command in COMMANDS.items() for word in (name, *command.scripts)}


def run_command(name: str, words: Sequence[str] | None = None) -> NoReturn:
    """Run the command `name` (or the script of that name) with `words` (None = sys.argv) and leave with its status."""

    # imported inside, so that a missing package is a sentence, and a mistyped flag is one before PyTorch is there
    def called(given: Sequence[str]) -> int | None:
        given = translated(name, given) if name in OLD_SCRIPTS else given
        flags = f"{PARSERS}.{NAMED[name]}"
        if importlib.util.find_spec(flags) is not None:
            parser: Parser = importlib.import_module(flags).parser()
            found = parser.parse_args(given)
            if not one_of_several():
                check_paths(parser, found)
            given = local_words(given)  # train does it with its settings, which may come from files
        with loading("torch"):
            command = importlib.import_module(f"rwkv_rlhf.commands.{NAMED[name]}")
        main: Callable[[Sequence[str]], int | None] = command.main
        return main(given)

    run(called, words)


def check_paths(parser: Parser, found: argparse.Namespace) -> None:
    """Raises ValueError, with the flag, for the first of the command's files that is not there."""
    for name, holds in parser.paths.items():
        value = getattr(found, name)
        if value and holds == "template":
            from rwkv_rlhf.data.templates.named import check_template

            check_template(value)
        elif value:
            check_path(f"--{name}", holds, value)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """`rwkv-rlhf <command> ...`; without a command it lists them."""
    given = list(sys.argv[1:] if words is None else words)
    if given and given[0] in NAMED:
        if words is None:
            sys.argv = [f"rwkv-rlhf {given[0]}", *given[1:]]  # what --help calls the program
        run_command(given[0], given[1:])
    if given and given[0] == "--version":
        sys.stdout.write(f"{PROGRAM} {PROGRAM_VERSION}\n")
        sys.exit(0)
    if given and given[0] not in ("-h", "--help", "help"):
        sys.stderr.write(f"error: unknown command {given[0]}; the commands are {', '.join(COMMANDS)}\n")
        sys.exit(2)
    lines = [
        f"  {name:20}{command.help}" + (f" ({command.scripts[0]}.py)" if command.scripts else "")
        for name, command in COMMANDS.items()
    ]
    sys.stdout.write("\n".join([f"{PROGRAM}: rwkv-rlhf <command> --help says more of each", *lines]) + "\n")
    sys.exit(0)
