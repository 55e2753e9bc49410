"""Write a layer profile: python make_profile.py --make lora --layers 24 --rank 16 --output my.csv"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("make_profile")
