"""Flags that several commands have, each group declared once."""

from argparse import Namespace

from rwkv_rlhf.checkpoints.adapter_files import NO_FLAGS, AdapterFlags
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.data.tokenizer import WORLD_SIZE
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.precision import STRATEGY_HELP
from rwkv_rlhf.settings.command_line import Parser
from rwkv_rlhf.settings.shapes import SHAPES, THINKING


def add_model_flags(flags: Parser, model: str, *, adapter: bool = True, strategy: str = "auto") -> None:
    """Which model runs and where: --load_model (help text `model`), --load_adapter, --strategy."""
    flags.add_argument("--load_model", required=True, help=model)
    if adapter:
        flags.add_argument("--load_adapter", default="", help="adapter checkpoint laid over it")
    flags.add_argument("--strategy", default=strategy, help=f"{STRATEGY_HELP} [{strategy}]")


# what to do about a mismatch of model, adapter and the flags below
ADAPTER_HINTS = {
    "base": "give the right --load_model",
    "scaling": "leave --lora_scaling out",
    "alpha": "leave --lora_alpha out",
    "factors": "give them with --load_adapter_pissa_init",
    "cold": "--load_cold_adapter must name what was merged below it, or be left out",
    "no scaling": "--lora_scaling (alpha / rank) or --lora_alpha",
}


def add_adapter_flags(flags: Parser) -> None:
    """What --load_adapter does not say itself: --lora_scaling, --lora_alpha, its PiSSA factors, its cold adapter."""
    flags.add_argument("--lora_scaling", type=float, help="its alpha / rank, needed when there is no .json beside it")
    flags.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    flags.add_argument("--load_adapter_pissa_init", default="", help="its PiSSA factors, if they are not beside it")
    flags.add_argument("--load_cold_adapter", default="", help="adapter merged below it, if it is not where it was")


def adapter_flags(flags: Namespace) -> AdapterFlags:
    """What the flags say of --load_adapter. Raises ValueError when there is none."""
    said = AdapterFlags(scaling=flags.lora_scaling, alpha=flags.lora_alpha)
    if not flags.load_adapter and said != NO_FLAGS:
        raise ValueError("--lora_scaling and --lora_alpha need --load_adapter")
    return said


def add_devices_flag(flags: Parser) -> None:
    """--devices of a command whose rows several processes share (`several.py`)."""
    flags.add_argument("--devices", type=int, help="processes that share the rows, one a GPU [1, or torchrun's]")


def add_vocabulary_flag(flags: Parser) -> None:
    """--vocab_file."""
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")


def add_text_flags(flags: Parser) -> None:
    """How rows become conversations, and these tokens: --format, --thinking, --template, --vocab_file."""
    add_reading_flags(flags)
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)}, or a Jinja file [world]")
    add_vocabulary_flag(flags)


def add_reading_flags(flags: Parser) -> None:
    """How rows are read: --format, --thinking."""
    flags.add_argument("--format", default="", choices=("", *SHAPES), help="shape of the rows; empty = recognised")
    help = "thinking beside answers: kept as <think>...</think>, or dropped [keep]"
    flags.add_argument("--thinking", default="keep", choices=THINKING, help=help)


def reading_of(flags: Namespace) -> Reading:
    """What these flags say."""
    return Reading(flags.format, flags.thinking == "drop")


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
