"""The flags of `chat`."""

from argparse import Namespace

from rwkv_rlhf.commands.flag_groups import (
    add_devices_flag,
    add_opened_model_flags,
    add_text_flags,
)
from rwkv_rlhf.generation.sampling_params import add_sampling_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Talk to a model, or let it answer a file of prompts.")
    add_opened_model_flags(flags, "checkpoint of the model")
    text = "another model (a run's folder too) that answers beside it"
    flags.add_path("--compare", holds="model", default="", help=text)
    flags.add_argument("--history", default="", help="file that keeps the lines typed in conversations [none]")
    text = "file of prompts, chats or pairs; empty = talk"
    flags.add_path("--prompt_file", holds="data", default="", help=text)
    text = "JSONL of answers to write (with --prompt_file)"
    flags.add_output("--output", forms=("jsonl",), default="", help=text)
    add_sampling_flags(flags, top_p=0.7)
    flags.add_count("--batch_size", default=32, help="prompts of a file answered at once [32]")
    add_text_flags(flags)
    add_devices_flag(flags)
    flags.checks.append(check_task)
    return flags


def check_task(found: Namespace) -> None:
    """Raises ValueError for flags of a conversation and of a file of prompts together."""
    if bool(found.prompt_file) != bool(found.output):
        raise ValueError("--prompt_file and --output go together")
    if found.prompt_file and found.compare:
        raise ValueError("--compare is for a conversation; to compare answers to a file of prompts: label.py")
    if not found.prompt_file and (found.devices or 1) > 1:
        raise ValueError(f"--devices {found.devices}: a conversation runs in one process; it is for --prompt_file")
