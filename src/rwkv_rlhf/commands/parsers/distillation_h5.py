"""The flags of `distillation_h5`."""

from argparse import Namespace

from rwkv_rlhf.commands.flag_groups import add_document_flags, add_model_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Write a teacher's largest logits for each token of a set of documents.")
    add_model_flags(flags, "the teacher: a checkpoint (.pth or .safetensors)")
    flags.add_argument("--load_initial_state", default="", help="not built yet; the older script ignored it")
    flags.add_count("--top_k", default=100, help="logits kept per token [100]")
    flags.add_count("--batch_tokens", default=4096, help="tokens in one forward pass [4096]")
    add_document_flags(flags, "distillation.h5")
    flags.checks.append(check_state)
    return flags


def check_state(found: Namespace) -> None:
    """Raises ValueError for what is not built."""
    if found.load_initial_state:
        raise ValueError("--load_initial_state: starting the teacher from a tuned state is not built yet")
