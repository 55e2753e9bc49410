"""The flags of `score`."""

from rwkv_rlhf.commands.flag_groups import add_model_flags, add_skip_flag, add_text_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Let a reward model score a file of answers.")
    add_model_flags(flags, "the reward model (merged), or its base with --load_adapter")
    flags.add_path("--input", holds="file", required=True, help="JSONL of prompts and answers")
    text = "JSONL to write: the same objects with their reward"
    flags.add_output("--output", forms=("jsonl",), required=True, help=text)
    add_text_flags(flags)
    add_skip_flag(flags)
    return flags
