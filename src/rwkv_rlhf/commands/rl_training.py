"""PPO as the neural_chat pipeline spells it: train.py --ppo 1 by other words."""

from collections.abc import Sequence

from rwkv_rlhf.commands.stages import run_stage, translated
from rwkv_rlhf.settings.command_line import parse as parse_training
from rwkv_rlhf.settings.config import Config

NAME = "rl_training"


def parse(words: Sequence[str]) -> Config:
    """The run that these words ask for. Raises UsageError."""
    return parse_training(translated(NAME, words))


def main(words: Sequence[str]) -> int | None:
    """Trains. Returns the exit status."""
    return run_stage(NAME, words)
