"""`python -m rwkv_rlhf <command>`, and what a run with several processes starts the others with."""

import sys
from pathlib import Path

if not __package__:  # run as a file: its folder would hide the standard library's names behind the rooms'
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rwkv_rlhf.commands import main

if __name__ == "__main__":
    main()
