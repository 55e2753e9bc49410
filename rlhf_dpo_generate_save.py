"""CSV, JSONL or parquet of preference pairs -> tokenised pairs with reference log-probabilities (.save) for DPO."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_rlhf.commands import run_command

if __name__ == "__main__":
    run_command("score_pairs")
