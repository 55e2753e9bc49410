"""Make one model of a base model and a checkpoint of training, or take an adapter to the PEFT library and back."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("merge")
