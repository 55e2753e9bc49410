"""Merging as the neural_chat pipeline spells it: merge.py by other words.

python merge_peft_adapter.py --adapter_model_name RUN --output_name MODEL

The base is the one that the run began from, unless --base_model is given. MODEL is a file, or a folder in which it will
be `rwkv-final.pth`; either is a model to the other stages.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.checkpoints.named_model import FINALS, named_model
from rwkv_rlhf.commands import merge
from rwkv_rlhf.commands.parsers.merge import EXPORTED, SUFFIXES, parser
from rwkv_rlhf.commands.stages import translated, value_of

NAME = "merge_peft_adapter"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags of merge.py that these words ask for; no file is opened. Raises ValueError."""
    flags: argparse.Namespace = parser().parse_args(
        ["--base_model", "that of the checkpoint", *translated(NAME, words)]
    )
    return flags


def main(words: Sequence[str]) -> int:
    """Merges. Returns the exit status; raises ValueError, also when the checkpoint or its base is not there."""
    new = translated(NAME, words)
    checkpoint, output = value_of(new, "--lora_checkpoint"), value_of(new, "--output")
    if checkpoint and not value_of(new, "--base_model"):
        named = named_model(checkpoint)
        if named.adapter is None:
            raise ValueError(f"{checkpoint} has no .json beside it that names its base: give --base_model")
        new += ["--base_model", str(named.base)]
    if output and not output.endswith((*SUFFIXES, *EXPORTED)):
        Path(output).mkdir(parents=True, exist_ok=True)
        new += ["--output", str(Path(output) / FINALS[0])]
    return merge.main(new)
