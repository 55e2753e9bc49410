"""Commands that several processes share: which program they are started with, and how a script says how many."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rwkv_rlhf.distributed.launch import launched
from rwkv_rlhf.precision import parse_strategy
from rwkv_rlhf.settings.config import Config

SELF = str(Path(__file__).resolve().parents[1] / "__main__.py")  # what the other processes of a run are started with


@contextmanager
def several(flags: Namespace, command: str, words: Sequence[str]) -> Iterator[None]:
    """Inside the block the processes of `command` are connected: --devices of them, or as many as a launcher started.

    words: behind the command's name. Raises ValueError where flags, launcher and machine do not fit together.
    """
    device = parse_strategy(flags.strategy).device
    if ":" in device and (flags.devices or 1) > 1:
        raise ValueError(f"--strategy {flags.strategy!r} names one GPU and --devices {flags.devices} asks for more")
    config = Config(
        devices=flags.devices or 1,
        accelerator="cpu" if device == "cpu" else "gpu",
        given=frozenset() if flags.devices is None else frozenset({"devices"}),
    )
    with launched(config, [SELF, command, *words]):
        yield
