"""Flags that several commands have, each group declared once."""

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.data.tokenizer import WORLD_SIZE
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.precision import STRATEGY_HELP
from rwkv_rlhf.settings.command_line import Parser


def add_model_flags(flags: Parser, model: str, *, adapter: bool = True, strategy: str = "auto") -> None:
    """Which model runs and where: --load_model (help text `model`), --load_adapter, --strategy."""
    flags.add_argument("--load_model", required=True, help=model)
    if adapter:
        flags.add_argument("--load_adapter", default="", help="adapter checkpoint laid over it")
    flags.add_argument("--strategy", default=strategy, help=f"{STRATEGY_HELP} [{strategy}]")


def add_devices_flag(flags: Parser) -> None:
    """--devices of a command whose rows several processes share (`several.py`)."""
    flags.add_argument("--devices", type=int, help="processes that share the rows, one a GPU [1, or torchrun's]")


def add_vocabulary_flag(flags: Parser) -> None:
    """--vocab_file."""
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")


def add_text_flags(flags: Parser) -> None:
    """How conversations become tokens: --template, --vocab_file."""
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)}, or a Jinja file [world]")
    add_vocabulary_flag(flags)


def add_skip_flag(flags: Parser) -> None:
    """--skip_bad."""
    flags.add_switch("--skip_bad", help="count and leave out bad rows instead of stopping")


def add_seed_and_skip_flags(flags: Parser, seed: str) -> None:
    """--random_seed (help text `seed`) and --skip_bad."""
    flags.add_argument("--random_seed", type=int, default=TEMPLATE_SEED, help=f"{seed} [{TEMPLATE_SEED}]")
    add_skip_flag(flags)


def add_vocabulary_size_flags(flags: Parser) -> None:
    """--load_model and --vocab_size of a command that runs no model; see `vocabulary_size`."""
    flags.add_argument("--load_model", default="", help="checkpoint whose vocabulary size is used; it is not run")
    flags.add_argument("--vocab_size", type=int, default=0, help=f"vocabulary size if no model is given [{WORLD_SIZE}]")


def vocabulary_size(model: str, given: int) -> int:
    """The checkpoint's vocabulary size, or the flag's, or World's; ValueError when checkpoint and flag disagree."""
    if model in ("", "0"):
        return given or WORLD_SIZE
    found = sizes_of(read_tensors(model)).vocab_size
    if given and given != found:
        raise ValueError(f"--vocab_size {given}, but {model} has a vocabulary of {found}")
    return found
