"""A frozen reward model beside the model that is trained: from a file, a checkpoint of training, or a run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.checkpoints.loading import BuildOptions, as_trained, load_model
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.named_model import named_model
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.rewards import SCORE_HEAD, answer_rewards


class RewardModel:
    """Scores whole answers, each by itself."""

    def __init__(self, model: RWKV, chunk: int = 0) -> None:
        self.model, self.chunk = model.requires_grad_(False).eval(), chunk

    def rewards(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each answer to its prompt, token ids of the shared vocabulary. This rank scores what it has."""
        found = answer_rewards(self.model, prompts, [(answer,) for answer in answers], chunk=self.chunk, alone=True)
        return [float(reward) for reward in found[:, 0]]


def open_reward_model(
    path: str | Path, options: BuildOptions, vocab_size: int, *, bases: Sequence[str | Path] = (), chunk: int = 0
) -> RewardModel:
    """The reward model behind `path`; `bases` are further files that its base may be.

    options: device and compute dtype; the layout is the file's own. Raises ValueError in one sentence for files that
    are missing or do not fit each other, for a model without a score head, and for another vocabulary than
    `vocab_size`.
    """
    try:
        named = named_model(path, bases)
    except ValueError as mistake:
        raise ValueError(f"{{reward_model}} {mistake}") from mistake
    if named.adapter is not None:
        model, _ = load_combined(named.base, named.adapter, options)
    else:
        layout = as_trained(named.base, "none")
        model, _ = load_model(named.base, dataclasses.replace(options, layout=layout))
    if model.scalar_head(SCORE_HEAD) is None:
        raise ValueError(
            f"{{reward_model}} {path} is no reward model: it has no {SCORE_HEAD}.weight (train with {{rm}} 1)"
        )
    if model.sizes.vocab_size != vocab_size:
        raise ValueError(
            f"{{reward_model}} {path} has a vocabulary of {model.sizes.vocab_size}, the model that is trained one of "
            f"{vocab_size}: it would read other words than those that were sampled"
        )
    return RewardModel(model, chunk)
