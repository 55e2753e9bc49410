"""The flags of `sft_h5`."""

from rwkv_rlhf.commands.flag_groups import add_document_flags, add_vocabulary_size_flags, add_workers_flag
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise documents and chats into an .h5 for supervised fine-tuning.")
    add_vocabulary_size_flags(flags)
    add_document_flags(flags, "sft.h5")
    add_workers_flag(flags)
    return flags
