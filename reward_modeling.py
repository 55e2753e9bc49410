"""A reward model as the neural_chat pipeline spells it: train.py --rm 1 by other words."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("reward_modeling")
