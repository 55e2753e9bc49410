"""What the command line understands but the program cannot do yet: one table, which later work empties.

A command that asks for one of these stops with exit status 2 and the sentence beside it, instead of doing something
else in silence. Each sentence says what to use meanwhile, where there is something.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import ConstraintError, say


class NotBuilt(NamedTuple):
    """A part that is not built: the setting, which of its values ask for it, and what to say."""

    setting: str
    wanted: Callable[[Any], bool]
    sentence: str


NOT_BUILT = (
    NotBuilt(
        "precision",
        lambda precision: precision == "fp16",
        "{precision=}: half precision with loss scaling is not built yet; bf16, fp32 and fp64 are",
    ),
    NotBuilt(
        "optim",
        lambda optim: not tables.OPTIMIZERS[optim].implementation,
        "{optim=}: this optimizer is not built yet; adamw is",
    ),
    NotBuilt(
        "weight_decay_final",
        lambda decay: decay >= 0,
        "{weight_decay_final=}: a schedule of the weight decay is not built yet; leave it -1",
    ),
    NotBuilt(
        "dropout",
        lambda share: share > 0,
        "{dropout=}: dropout in the blocks is not built yet; adapters have {lora_dropout}",
    ),
    NotBuilt(
        "wkv_backend",
        lambda backend: backend != "auto" and not tables.BACKENDS[backend].implementation,
        "{wkv_backend=}: this kernel is not built yet; auto, naive, cpu, cuda and triton are",
    ),
    NotBuilt("compile", bool, "{compile} 1: compiling the model is not built yet; leave it 0"),
)


def refuse_not_built(config: Config) -> None:
    """Raises ConstraintError with the sentence of the first missing part that the run asks for."""
    for part in NOT_BUILT:
        if part.wanted(getattr(config, part.setting)):
            raise ConstraintError(part.setting, say(part.sentence, config))


def values_not_built(name: str, values: Iterable[Any]) -> list[Any]:
    """Which of the `values` that the setting `name` may have are not built yet."""
    parts = [part for part in NOT_BUILT if part.setting == name]
    return [value for value in values if any(part.wanted(value) for part in parts)]
