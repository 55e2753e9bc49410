"""The other name of rlhf_generate_reject_csv.py."""

from rlhf_generate_reject_csv import main
from src.cli import run

if __name__ == "__main__":
    run(main)
