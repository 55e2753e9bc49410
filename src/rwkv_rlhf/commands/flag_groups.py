"""Flags that several commands have, each group declared once. What they say is read in `flag_values.py`."""

from rwkv_rlhf.data.templates.named import TEMPLATE_SEED
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.data.tokenizer import WORLD_SIZE
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import Parser
from rwkv_rlhf.settings.shapes import SHAPES, THINKING

STRATEGY_HELP = "device and precision: cuda or cpu, fp16, bf16, fp32, int8 or nf4; auto = GPU in bf16, else CPU in fp32"


def add_model_flags(flags: Parser, model: str, *, adapter: bool = True, strategy: str = "auto") -> None:
    """Which model runs and where: --load_model (help text `model`), --load_adapter, --strategy."""
    flags.add_path("--load_model", holds="model", required=True, help=model)
    if adapter:
        flags.add_path("--load_adapter", holds="model", default="", help="adapter checkpoint laid over it")
    flags.add_argument("--strategy", default=strategy, help=f"{STRATEGY_HELP} [{strategy}]")


def add_adapter_flags(flags: Parser) -> None:
    """What --load_adapter does not say itself: --lora_scaling, --lora_alpha, its PiSSA factors, its cold adapter."""
    flags.add_argument("--lora_scaling", type=float, help="its alpha / rank, needed when there is no .json beside it")
    flags.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    text = "its PiSSA factors, if they are not beside it"
    flags.add_path("--load_adapter_pissa_init", holds="model", default="", help=text)
    text = "adapter merged below it, if it is not where it was"
    flags.add_path("--load_cold_adapter", holds="model", default="", help=text)


def add_opened_model_flags(flags: Parser, model: str) -> None:
    """What `flag_values.opened_model` reads, but for --vocab_file. model: the help text of --load_model."""
    add_model_flags(flags, model)
    add_adapter_flags(flags)
    text = "storage of the matrices of a model without adapter; with one it is that of the training [none]"
    flags.add_argument("--quant_mode", default=tables.DENSE, choices=(tables.DENSE, *tables.STORAGES), help=text)


def add_devices_flag(flags: Parser) -> None:
    """--devices of a command whose rows several processes share (`several.py`)."""
    flags.add_count("--devices", help="processes that share the rows, one a GPU [1, or torchrun's]")


def add_vocabulary_flag(flags: Parser) -> None:
    """--vocab_file."""
    flags.add_path("--vocab_file", holds="file", default="", help="tokenizer.json or trie vocabulary; empty = World")


def add_text_flags(flags: Parser) -> None:
    """How rows become conversations, and these tokens: --format, --thinking, --template, --vocab_file."""
    add_reading_flags(flags)
    text = f"one of {', '.join(TEMPLATES)}, or a Jinja file [world]"
    flags.add_path("--template", holds="template", default="world", help=text)
    add_vocabulary_flag(flags)


def add_trained_template_flag(flags: Parser) -> None:
    """--template, by default that of the training."""
    text = f"one of {', '.join(TEMPLATES)}, or a Jinja file [the one that the adapter was trained with, else world]"
    flags.add_path("--template", holds="template", default="", help=text)


def add_reading_flags(flags: Parser) -> None:
    """How rows are read: --format, --thinking."""
    flags.add_argument("--format", default="", choices=("", *SHAPES), help="shape of the rows; empty = recognised")
    help = "thinking beside answers: kept as <think>...</think>, or dropped [keep]"
    flags.add_argument("--thinking", default="keep", choices=THINKING, help=help)


def add_workers_flag(flags: Parser) -> None:
    """--workers of a command that tokenises and does nothing else."""
    flags.add_argument("--workers", type=int, default=0, help="processes that tokenise; 0 = one a core for large files")


def add_skip_flag(flags: Parser) -> None:
    """--skip_bad."""
    flags.add_switch("--skip_bad", help="count and leave out bad rows instead of stopping")


def add_seed_and_skip_flags(flags: Parser, seed: str) -> None:
    """--random_seed (help text `seed`) and --skip_bad."""
    flags.add_argument("--random_seed", type=int, default=TEMPLATE_SEED, help=f"{seed} [{TEMPLATE_SEED}]")
    add_skip_flag(flags)


def add_vocabulary_size_flags(flags: Parser) -> None:
    """--load_model and --vocab_size of a command that runs no model; see `vocabulary_size`."""
    text = "checkpoint whose vocabulary size is used; it is not run"
    flags.add_path("--load_model", holds="model", default="", help=text)
    flags.add_argument("--vocab_size", type=int, default=0, help=f"vocabulary size if no model is given [{WORLD_SIZE}]")


def add_pair_flags(flags: Parser, output: str) -> None:
    """Adds the flags of every script that turns pairs into a .save file, by default `output`."""
    text = "preference pairs (docs/data.md): files, a folder, a pattern"
    flags.add_path("--input_csv", holds="data", required=True, help=text)
    flags.add_output("--output_save", forms=("save",), default=output, help=f"file to write [{output}]")
    flags.add_argument("--target_pair_count", type=int, default=1000, help="pairs to write; rows are cycled [1000]")
    add_text_flags(flags)
    flags.add_count("--rlhf_max_corpus_len", least=0, default=0, help="cap on each part in tokens; 0 = none [0]")
    flags.add_argument("--split", default="", help="shares of train, valid (and test) files, e.g. 0.8,0.1,0.1")
    flags.add_switch("--drop_ties", help="leave out pairs whose answers have the same score")
    add_seed_and_skip_flags(flags, "seed of the template mixed and of the shuffle")


def add_document_flags(flags: Parser, output: str) -> None:
    """Adds the flags of every script that turns documents into an .h5, by default `output`."""
    text = "documents and chats: files, a folder, a pattern"
    flags.add_path("--input_folder", "--input", holds="data", required=True, help=text)
    text = f"the .h5 to write [{output}]"
    flags.add_output("--output_parquet", "--output_h5", forms=("h5",), default=output, help=text)
    add_text_flags(flags)
    flags.add_switch("--train_on_prompt", help="chats: learn all turns, not only the assistant's")
    add_seed_and_skip_flags(flags, "seed of the template mixed")
