"""Merge a LoRA adapter into its model, as RWKV-LM-LoRA's script: ALPHA BASE LORA OUTPUT. It is merge.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("merge_lora")
