"""The flags of `merge_peft_adapter`: those of `merge`, by other words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.commands.parsers import merge
from rwkv_rlhf.commands.stages import translated, value_of
from rwkv_rlhf.files import FINAL, MODEL_SUFFIXES

NAME = "merge_peft_adapter"
NOT_SAID = "that of the checkpoint"  # stands for --base_model where nothing was typed


class Spelled(merge.Tasks):
    """Takes the words of the pipeline. say: tells what was spelled otherwise."""

    say = False

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses `args`; raises as `merge.Tasks`. `base_model` is "" where that of the checkpoint is meant, `folder`
        what --output_name names where that is no file."""
        words = translated(NAME, args or (), say=self.say)
        output = value_of(words, "--output")
        words += ["--output", output_file(output)] if output else []
        found = super().parse_args(["--base_model", NOT_SAID, *words], namespace)
        found.folder = output if output and found.output != output else ""
        found.base_model = found.base_model.replace(NOT_SAID, "")
        return found


def output_file(output: str) -> str:
    """What --output_name means: a file, or in a folder its rwkv-final.pth."""
    if output.endswith((*merge.SUFFIXES, *merge.EXPORTED)):
        return output
    return str(Path(output) / f"{FINAL}{MODEL_SUFFIXES['pth']}")


def parser(say: bool = False) -> Spelled:
    """The flags of this script."""
    flags = merge.add_flags(Spelled("Merging as the neural_chat pipeline spells it."))
    flags.say = say
    return flags
