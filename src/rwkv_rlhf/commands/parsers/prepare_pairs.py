"""The flags of `prepare_pairs`."""

from rwkv_rlhf.commands.flag_groups import add_pair_flags, add_vocabulary_size_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise preference pairs for ORPO without running a model.")
    add_vocabulary_size_flags(flags)
    add_pair_flags(flags, "orpotest.save")
    return flags
