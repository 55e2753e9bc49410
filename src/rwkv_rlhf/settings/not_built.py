"""What the command line understands but the program cannot do yet: one table, which later work empties.

A command that asks for one of these stops with exit status 2 and the sentence beside it, instead of doing something
else in silence. Each sentence says what to use meanwhile, where there is something.
"""

from collections.abc import Callable
from typing import NamedTuple

from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import say


class Missing(NamedTuple):
    """A part that is not built: when a run asks for it, and what to say."""

    wanted: Callable[[Config], bool]
    sentence: str


NOT_BUILT = (
    Missing(
        lambda c: c.loss in ("rm", "ppo", "grpo"),
        "{loss=}: this loss is not built yet; reward models and losses that sample answers are the ones missing",
    ),
    Missing(
        lambda c: c.precision == "fp16",
        "{precision=}: half precision with loss scaling is not built yet; bf16, fp32 and fp64 are",
    ),
    Missing(
        lambda c: c.optim != "adamw",
        "{optim=}: this optimizer is not built yet; adamw is",
    ),
    Missing(
        lambda c: c.weight_decay_final >= 0,
        "{weight_decay_final=}: a schedule of the weight decay is not built yet; leave it -1",
    ),
    Missing(
        lambda c: c.dropout > 0,
        "{dropout=}: dropout in the blocks is not built yet; adapters have {lora_dropout}",
    ),
    Missing(
        lambda c: c.wkv_backend not in ("auto", "naive", "cpu", "cuda"),
        "{wkv_backend=}: this kernel is not built yet; auto, naive, cpu and cuda are",
    ),
    Missing(
        lambda c: c.compile,
        "{compile} 1: compiling the model is not built yet; leave it 0",
    ),
)


def refuse_not_built(config: Config) -> None:
    """Raises ValueError with the sentence of the first missing part that the run asks for."""
    for part in NOT_BUILT:
        if part.wanted(config):
            raise ValueError(say(part.sentence, config))
