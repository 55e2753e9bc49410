"""The flags of `convert`."""

from __future__ import annotations

from argparse import Namespace

from rwkv_rlhf.commands.flag_groups import add_reading_flags, add_skip_flag
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Convert data of any shape into the form of this program.")
    text = "what to read: a file, a folder, a pattern (docs/data.md)"
    flags.add_path("--input", holds="data", required=True, help=text)
    flags.add_argument("--output", default="", help="JSONL to write")
    flags.add_switch("--dry_run", help="count, show three rows, write nothing")
    add_reading_flags(flags)
    add_skip_flag(flags)
    flags.checks.append(check_output)
    return flags


def check_output(found: Namespace) -> None:
    """Raises ValueError where nothing says what is to be written."""
    if not found.output and not found.dry_run:
        raise ValueError("--output OUT.jsonl is needed (or --dry_run 1)")
