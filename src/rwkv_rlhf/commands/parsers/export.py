"""The flags of `export`."""

from __future__ import annotations

from argparse import Namespace

from rwkv_rlhf.commands.flag_groups import add_adapter_flags, add_trained_template_flag, add_vocabulary_flag
from rwkv_rlhf.settings.command_line import Parser, truth
from rwkv_rlhf.settings.exports import EXPORTS

DTYPES = tuple(
    dict.fromkeys(dtype for facts in EXPORTS.values() if facts.target for dtype in facts.target.dtypes if dtype)
)


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Write a model, or a model with its adapter, for another program.")
    targets = "; ".join(f"{name}: {facts.help}" for name, facts in EXPORTS.items())
    flags.add_path("--load_model", holds="model", default="", help="checkpoint of the model")
    flags.add_path("--load_adapter", holds="model", default="", help="adapter checkpoint that is merged into it")
    add_adapter_flags(flags)
    flags.add_argument("--to", required=True, choices=tuple(EXPORTS), help=targets)
    flags.add_argument("--output", required=True, help="the file or folder to write")
    flags.add_argument("--dtype", default="", choices=("", *DTYPES), help="of the matrices [the target's usual one]")
    flags.add_argument("--shard_size", type=float, default=4.0, help="largest file of several, in GiB [4]")
    add_trained_template_flag(flags)
    add_vocabulary_flag(flags)
    flags.add_argument("--name", default="", help="what the file calls the model [the name of --output]")
    flags.add_argument("--licence", default="", help="licence of the model, to be written into it")
    flags.add_argument("--source", default="", help="address where the model comes from, to be written into it")
    text = "run the result in the other program: 1 must, 0 not [where it is installed]"
    flags.add_argument("--check", nargs="?", const=True, default=None, type=truth, metavar="0/1", help=text)
    flags.add_switch("--force", help="go on although the adapter was trained on another model")
    flags.checks.append(check_task)
    return flags


def check_task(found: Namespace) -> None:
    """Raises ValueError for flags that do not go with --to."""
    facts = EXPORTS[found.to].target
    if facts is None:
        if not found.load_adapter:
            raise ValueError(f"--to {found.to} takes an adapter: --load_adapter")
        return
    if not found.load_model:
        raise ValueError(f"--to {found.to} needs --load_model; an adapter alone goes to peft")
    if found.shard_size <= 0:
        raise ValueError(f"--shard_size {found.shard_size}: must be larger than 0")
    if facts.suffixes and not found.output.endswith(facts.suffixes):
        legal = " or ".join(facts.suffixes)
        raise ValueError(f"--output {found.output}: the name must end in {legal} with --to {found.to}")
    if found.check and not facts.judge:
        raise ValueError(f"--check 1: there is no program here that could run --to {found.to}")
