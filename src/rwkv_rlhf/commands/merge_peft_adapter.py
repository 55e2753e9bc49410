"""Merging as the neural_chat pipeline spells it: merge.py by other words.

python merge_peft_adapter.py --adapter_model_name RUN --output_name MODEL

The base is the one that the run began from, unless --base_model is given. MODEL is a file, or a folder in which it will
be `rwkv-final.pth`; either is a model to the other stages.
"""

from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.checkpoints.named_model import named_model
from rwkv_rlhf.commands import merge
from rwkv_rlhf.commands.parsers.merge_peft_adapter import NAME, output_file, parser
from rwkv_rlhf.commands.stages import translated, value_of


def main(words: Sequence[str]) -> int:
    """Merges. Returns the exit status; raises ValueError, also when the checkpoint or its base is not there."""
    parser().parse_args(words)
    new = translated(NAME, words)
    checkpoint, output = value_of(new, "--lora_checkpoint"), value_of(new, "--output")
    if checkpoint and not value_of(new, "--base_model"):
        named = named_model(checkpoint)
        if named.adapter is None:
            raise ValueError(f"{checkpoint} has no .json beside it that names its base: give --base_model")
        new += ["--base_model", str(named.base)]
    if output and output_file(output) != output:
        Path(output).mkdir(parents=True, exist_ok=True)
        new += ["--output", output_file(output)]
    return merge.main(new)
