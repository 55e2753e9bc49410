"""The other name of PrepareOrpoDataset.py."""

from PrepareOrpoDataset import main
from src.cli import run

if __name__ == "__main__":
    run(main)
