"""Merging as the neural_chat pipeline spells it: merge.py by other words.

python merge_peft_adapter.py --adapter_model_name RUN --output_name MODEL

The base is the one that the run began from, unless --base_model is given. MODEL is a file, or a folder in which it will
be `rwkv-final.pth`; either is a model to the other stages.
"""

from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.checkpoints.named_model import named_model
from rwkv_rlhf.commands import merge
from rwkv_rlhf.commands.parsers.merge_peft_adapter import parser


def main(words: Sequence[str]) -> int:
    """Merges. Returns the exit status; raises ValueError, also when the checkpoint or its base is not there."""
    args = parser(say=True).parse_args(words)
    if args.lora_checkpoint and not args.base_model:
        named = named_model(args.lora_checkpoint)
        if named.adapter is None:
            raise ValueError(f"{args.lora_checkpoint} has no .json beside it that names its base: give --base_model")
        args.base_model = str(named.base)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    merge.run(args)
    return 0
