"""The flags of `score_pairs`."""

from rwkv_rlhf.commands.flag_groups import add_model_flags, add_pair_flags
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise preference pairs and score them with the reference model.")
    add_model_flags(flags, "the reference: the model that training starts from", adapter=False)
    packed = "storage of the matrices; train.py uses the scores only with the same --quant_mode [none]"
    flags.add_argument("--quant_mode", default="none", choices=(tables.DENSE, *tables.STORAGES), help=packed)
    add_pair_flags(flags, "trainset.save")
    return flags
