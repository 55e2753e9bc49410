"""Rewards of sampled answers: functions of a Python file, with the signature that TRL's trainers ask for, and models.

    def exact(prompts, completions, completion_ids, **columns) -> list[float | None]

`prompts` are the values of the data file, `completions` the answers: texts, or where a prompt is a list of messages, a
list of one message of the assistant each. `columns` are the other columns of the data file, one value for each answer.
None: the function has no opinion on that answer.

A rewarder is any function of samples that gives one number (or None) for each.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_rlhf.rl.rollout import Sample
from rwkv_rlhf.scoring.reward_model import RewardModel
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.counted import counted

Rewarder = Callable[[Sequence[Sample]], Sequence[float | None]]


class RewardError(ValueError):
    """A reward that training cannot use: the run stops with what it has learnt."""


class RewardFunction:
    """A function of a user's file as a rewarder. Raises RewardError, with the sample, for whatever goes wrong in it."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        parameters = inspect.signature(function).parameters.values()
        several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        self.takes = {one.name for one in parameters}
        self.needs = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in several]

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        given = self._given(samples)
        if lacking := [name for name in self.needs if name not in given]:
            raise RewardError(
                f"{{reward_funcs}} {self.name} asks for {', '.join(lacking)}, and there is only {', '.join(given)}"
            )
        try:
            found = self._call(given)
        except (Exception, SystemExit) as error:  # a sys.exit() in it would end the run without a word
            said = f"{type(error).__name__}: {error}"
            raise RewardError(f"{{reward_funcs}} {self.name} raised {said}{self._culprit(samples)}") from error
        values = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else _listed(found)
        if values is None:
            raise RewardError(f"{{reward_funcs}} {self.name} gave a {type(found).__name__}, not a list of numbers")
        if len(values) != len(samples):
            answers = counted(len(samples), "answer")
            raise RewardError(f"{{reward_funcs}} {self.name} gave {counted(len(values), 'reward')} for {answers}")
        return [self._number(value, sample) for value, sample in zip(values, samples)]

    def _given(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """Everything that a function may ask for, by name."""
        given: dict[str, list[Any]] = {
            "prompts": [sample.asked.example.raw for sample in samples],
            "completions": [_completion(sample) for sample in samples],
            "completion_ids": [list(sample.ids) for sample in samples],
        }
        names = {name: None for sample in samples for name in sample.asked.example.columns}  # a set with an order
        for name in names:
            given.setdefault(name, [sample.asked.example.columns.get(name) for sample in samples])
        return given

    def _call(self, given: dict[str, list[Any]]) -> Any:
        return self.function(**{name: value for name, value in given.items() if self.takes_all or name in self.takes})

    def _culprit(self, samples: Sequence[Sample]) -> str:
        """The first sample for which the function fails alone."""
        for sample in samples:
            try:
                self._call(self._given([sample]))
            except (Exception, SystemExit):  # the one that is looked for
                return f" at {described(sample)}"
        return ""

    def _number(self, value: Any, sample: Sample) -> float | None:
        if value is None:
            return None
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            what = f"{value!r:.60}" if isinstance(value, int | float) else f"a {type(value).__name__} ({value!r:.60})"
            raise RewardError(f"{{reward_funcs}} {self.name} gave {what} for {described(sample)}; a number is needed")
        return float(value)


def _listed(found: Any) -> list[Any] | None:
    """An array or tensor of one dimension as a list; None for anything else."""
    value = found.tolist() if hasattr(found, "tolist") else None
    return value if isinstance(value, list) else None


def _completion(sample: Sample) -> Any:
    spoken = isinstance(sample.asked.example.raw, list)
    return [{"role": "assistant", "content": sample.text}] if spoken else sample.text


def described(sample: Sample) -> str:
    """A sample in a few words, for messages."""
    return f"the answer {sample.text!r:.80} to {sample.asked.example.where}"


def load_functions(setting: str) -> dict[str, Rewarder]:
    """The functions that --reward_funcs names (`rewards.py:exact,format`), by name.

    Raises ValueError for a file that is missing or does not import, and for a function that it lacks.
    """
    file, separator, names = setting.rpartition(":")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not separator or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"{{reward_funcs}} {setting}: expected a file and functions in it, as rewards.py:exact,format")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{{reward_funcs}} {setting}: there is no file {path}")
    module = _imported(path)
    functions = {name: one for name, one in vars(module).items() if callable(one) and not inspect.isclass(one)}
    for name in wanted:
        if name not in functions:
            there = ", ".join(functions) or "no function"
            raise ValueError(f"{{reward_funcs}} {setting}: {path} has no function {name}; it has {there}")
    return {name: RewardFunction(name, functions[name]) for name in wanted}


def _imported(path: Path) -> Any:
    """The user's own file as a module, which may import its neighbours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{{reward_funcs}} {path}: a Python file (.py) is needed")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{{reward_funcs}} {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


class ModelReward:
    """A reward model as a rewarder. Raises RewardError for a reward that is no finite number."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        rewards = self.model.rewards([one.asked.example.prompt for one in samples], [one.ids for one in samples])
        for reward, sample in zip(rewards, samples, strict=True):
            if not math.isfinite(reward):
                raise RewardError(f"{{reward_model}} gave {reward} for {described(sample)}")
        return rewards


class Judge(NamedTuple):
    """A rewarder with its weight in the sum."""

    rewarder: Rewarder
    weight: float = 1.0


class Rewards:
    """What --reward_funcs and the models say of answers, and their weighted sum."""

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = dict(judges)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their rewards. Raises RewardError where no rewarder has an opinion."""
        if not samples:
            return []
        found = {name: judge.rewarder(samples) for name, judge in self.judges.items()}
        rewarded = []
        for number, sample in enumerate(samples):
            given = {name: values[number] for name, values in found.items()}
            known = {name: value for name, value in given.items() if value is not None}
            if not known:
                raise RewardError(f"no reward for {described(sample)}: {', '.join(given)} gave None")
            total = sum(self.judges[name].weight * value for name, value in known.items())
            rewarded.append(dataclasses.replace(sample, rewards=given, reward=total))
        return rewarded


def open_rewards(config: Config, models: Mapping[str, Rewarder]) -> Rewards:
    """The functions of --reward_funcs and `models` by name, with --reward_weights. Raises ValueError for what is wrong
    with them."""
    functions = load_functions(config.reward_funcs) if config.reward_funcs else {}
    rewarders = functions | dict(models)
    weights = [1.0] * len(rewarders)
    if config.reward_weights:
        try:
            weights = [float(word) for word in config.reward_weights.split(",")]
        except ValueError:
            raise ValueError(f"{{reward_weights}} {config.reward_weights}: expected numbers such as 1,0.5") from None
        if len(weights) != len(rewarders) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"{{reward_weights}} {config.reward_weights}: {len(rewarders)} finite numbers are needed, for "
                f"{', '.join(rewarders)}"
            )
    return Rewards({name: Judge(one, weight) for (name, one), weight in zip(rewarders.items(), weights)})
