"""Make a binidx corpus of documents, as RWKV-LM's script: FILE REPEATS CTX_LEN. It is make_binidx.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("make_data")
