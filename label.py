"""Compare answers of a model in the browser, and get preference pairs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("label")
