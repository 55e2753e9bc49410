"""The flags of `make_binidx`."""

from rwkv_rlhf.commands.flag_groups import add_skip_flag, add_vocabulary_flag, add_workers_flag
from rwkv_rlhf.data.tokenizer import WORLD_SIZE
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Make a binidx corpus of documents.")
    flags.add_argument("--input", required=True, help='rows with {"text": ...}: files, a folder, a pattern')
    flags.add_argument("--output", required=True, help="PREFIX of PREFIX.bin and PREFIX.idx")
    flags.add_argument("--repeats", type=int, default=1, help="how often the documents are written [1]")
    flags.add_argument("--ctx_len", type=int, default=4096, help="context length the magic prime is for [4096]")
    flags.add_argument("--vocab_size", type=int, default=WORLD_SIZE, help=f"vocabulary size [{WORLD_SIZE}]")
    add_vocabulary_flag(flags)
    flags.add_argument("--random_seed", type=int, default=0, help="seed of the orders [0]")
    flags.add_switch("--shuffle", default=True, help="shuffle each time; 0 keeps the file's order [1]")
    add_skip_flag(flags)
    add_workers_flag(flags)
    return flags
