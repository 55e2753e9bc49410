"""JSONL (text, chats, prompt and completion) -> tokenised documents in HDF5 for --sft 1 --train_data_file F.h5."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("sft_h5")
