"""The flags of `make_binidx`."""

from rwkv_rlhf.commands.flag_groups import add_skip_flag, add_vocabulary_flag, add_workers_flag
from rwkv_rlhf.data.tokenizer import WORLD_SIZE
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Make a binidx corpus of documents.")
    text = 'rows with {"text": ...}: files, a folder, a pattern'
    flags.add_path("--input", holds="data", required=True, help=text)
    flags.add_argument("--output", required=True, help="PREFIX of PREFIX.bin and PREFIX.idx")
    flags.add_count("--repeats", default=1, help="how often the documents are written [1]")
    flags.add_count("--ctx_len", default=4096, help="context length the magic prime is for [4096]")
    flags.add_argument("--vocab_size", type=int, default=WORLD_SIZE, help=f"vocabulary size [{WORLD_SIZE}]")
    add_vocabulary_flag(flags)
    flags.add_argument("--random_seed", type=int, default=0, help="seed of the orders [0]")
    flags.add_switch("--shuffle", default=True, help="shuffle each time; 0 keeps the file's order [1]")
    add_skip_flag(flags)
    add_workers_flag(flags)
    return flags
