"""How answers are sampled: one frozen record, and the flags that every command that samples makes of its fields.

A new option is a field with `option(...)` here and its use in `sampling.py`: the commands have the flag by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from argparse import Namespace
from typing import Any

from rwkv_rlhf.data.tokenizer import END_OF_DOCUMENT
from rwkv_rlhf.settings.command_line import Parser

LIMITS = {"above": ("above", operator.gt), "least": ("at least", operator.ge), "most": ("at most", operator.le)}


def option(default: float, help: str, **limits: float) -> Any:
    """A field that is a flag too; `limits` (names of LIMITS) are what a legal value keeps, besides being finite."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What decides which tokens are sampled and when an answer ends.

    Attributes without a flag: `samples` answers to each prompt, which share its single run; `banned` ids are never
    sampled; an answer ends after a token of `stop_ids`, or when its text holds one of `stop_texts`. What is reported of
    each token is at `scored_temperature`, with the `entropy` of the whole distribution and the `top_logprobs` likeliest
    tokens if they are asked for.

    Raises ValueError, naming the flag, for a value that is not legal.
    """

    temperature: float = option(1.0, "randomness; 0 always takes the likeliest token", least=0)
    top_p: float = option(
        1.0, "sample from the likeliest tokens that sum to this probability; 1 = all", above=0, most=1
    )
    top_k: int = option(0, "sample from so many of the likeliest tokens; 0 = all", least=0)
    presence: float = option(0.0, "penalty on every token sampled before")
    frequency: float = option(0.0, "penalty for each time that a token was sampled before")
    penalty_decay: float = option(0.996, "what is left of the frequency penalty after each token", least=0, most=1)
    max_tokens: int = option(512, "longest answer in tokens", least=1)
    seed: int = option(0, "seed of the sampling")
    samples: int = 1
    banned: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ("\n\n",)
    stop_ids: tuple[int, ...] = (END_OF_DOCUMENT,)
    scored_temperature: float = 1.0
    entropy: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for field in options():
            value, limits = getattr(self, field.name), field.metadata["limits"]
            kept = all(LIMITS[name][1](value, limit) for name, limit in limits.items())
            if not (kept and math.isfinite(value)):
                legal = " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())
                raise ValueError(f"--{field.name} {value}: must be {legal or 'finite'} ({field.metadata['help']})")
        if self.samples < 1:
            raise ValueError(f"samples {self.samples}: must be at least 1")
        assert self.scored_temperature > 0

    @property
    def penalised(self) -> bool:
        """Whether what was sampled before matters."""
        return bool(self.presence or self.frequency)


def options() -> list[dataclasses.Field[Any]]:
    """The fields that are flags."""
    return [field for field in dataclasses.fields(SamplingParams) if "help" in field.metadata]


def option_types() -> dict[str, type]:
    """int or float of each field that is a flag."""
    types = typing.get_type_hints(SamplingParams)
    return {field.name: types[field.name] for field in options()}


def add_sampling_flags(flags: Parser, **defaults: float) -> None:
    """Adds a flag for each option; `defaults` are this command's, where they are not those of SamplingParams."""
    types = option_types()
    for field in options():
        default = defaults.get(field.name, field.default)
        text = f"{field.metadata['help']} [{default}]"
        flags.add_argument(f"--{field.name}", type=types[field.name], default=default, help=text)
    flags.checks.append(sampling_params)


def sampling_params(flags: Namespace, **fixed: Any) -> SamplingParams:
    """What the flags say; `fixed` are the fields that the command decides. Raises ValueError for illegal values."""
    return SamplingParams(**{field.name: getattr(flags, field.name) for field in options()}, **fixed)
