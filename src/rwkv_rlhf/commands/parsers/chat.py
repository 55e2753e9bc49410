"""The flags of `chat`."""

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
    flags.add_argument("--compare", default="", help="another model (a run's folder too) that answers beside it")
    flags.add_argument("--history", default="", help="file that keeps the lines typed in conversations [none]")
    flags.add_argument("--prompt_file", default="", help="file of prompts, chats or pairs; empty = talk")
    flags.add_argument("--output", default="", help="JSONL of answers to write (with --prompt_file)")
    add_sampling_flags(flags, top_p=0.7)
    flags.add_argument("--batch_size", type=int, default=32, help="prompts of a file answered at once [32]")
    add_text_flags(flags)
    add_devices_flag(flags)
    return flags
