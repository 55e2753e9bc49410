"""Merge a DiSHA adapter (Bone or MiSS) into its model, as RWKV-PEFT's script does. It is merge.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("merge_disha")
