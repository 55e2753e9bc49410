"""The groups of `--help`: a group begins with one field of Config and ends where the next one begins."""

from typing import NamedTuple

from rwkv_rlhf.settings.config import settings


class Group(NamedTuple):
    """A group of `--help`: it begins with the field `first` and ends where the next one begins."""

    first: str
    help: str


GROUPS = {
    "model": Group("load_model", "what to start from"),
    "run": Group("proj_dir", "where results go, which devices, resuming, looking before training"),
    "length": Group("epoch_steps", "how long to train"),
    "optimizer": Group("optim", "learning rates and the optimizer's step"),
    "trained": Group("layer_profile", "what is trained, and how the rest is stored"),
    "context": Group("ctx_len", "length of samples, infinite context"),
    "loss": Group("loss", "what is learnt"),
    "rl": Group("reward_model", "reinforcement learning"),
    "data": Group("data_file", "what is trained on"),
    "evaluation": Group("val_file", "held-out data"),
    "saving": Group("save_dtype", "checkpoints"),
}


def grouped_settings() -> dict[str, list[str]]:
    """Group of the help -> its settings, both in order."""
    first = {about.first: group for group, about in GROUPS.items()}
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    group = next(iter(GROUPS))
    for name in settings():
        group = first.get(name, group)
        found[group].append(name)
    return found
