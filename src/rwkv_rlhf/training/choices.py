"""What a run takes for settings that nobody typed, in one line each."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import NamedTuple

from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.data.text.binidx import Slices
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.ops.fastest import SLOWER, fastest_precision, slowness
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import text_format, trains

log = logging.getLogger(__name__)

PASSES = 3  # over the data, where no length of the run was typed


def with_precision(config: Config) -> Config:
    """The Config with the fastest precision of the device, if none was typed; a slow one that was is said.

    Raises ValueError when --accelerator names a device that is not there.
    """
    if config.dry_run_shape:  # of a machine that this one need not be
        return config
    device = device_for(config.accelerator)
    if "precision" in config.given:
        times = slowness(config.precision, device)
        if times > SLOWER:
            log.warning("--precision %s: a product takes %.0f times as long here as in fp32", config.precision, times)
        return config
    found = ranks.agreed(lambda: fastest_precision(device))
    if found != config.precision:
        log.info("--precision %s, as this machine is slow in %s", found, config.precision)
    return dataclasses.replace(config, precision=found)


def with_length(config: Config) -> Config:
    """The Config with --epochs as its number of mini-epochs; where no length was typed, PASSES of them over the data.

    A corpus of slices keeps the tradition's 500 mini-epochs of 1000 micro-batches, PPO counts its samples.
    """
    if config.own_length:
        return config
    typed = {"epoch_steps", "epoch_count", "save_steps", "my_exit_tokens"} & config.given
    corpus = config.loss_facts.data == "text" and text_format(config) == "binidx"
    epochs = config.epochs or (PASSES if trains(config) and not typed and not corpus else 0)
    if epochs and not config.epochs:
        log.info("--epochs %g, as no length of the run was typed", epochs)
    return dataclasses.replace(config, epochs=epochs, epoch_count=math.ceil(epochs)) if epochs else config


def as_typed(config: Config) -> Config:
    """The Config without the number of mini-epochs that `with_length` made of --epochs."""
    return dataclasses.replace(config, epoch_count=Config.epoch_count) if config.epochs else config


class Pass(NamedTuple):
    """Once through the data: `examples` (of a corpus, slices that share no token), each `again` times in a row (of
    prompts, as often as a rollout is trained on), `at_once` in an optimizer step."""

    examples: float
    again: int
    at_once: int

    @property
    def steps(self) -> float:
        """Optimizer steps in which each example comes once."""
        return max(1.0, self.examples) * self.again / self.at_once

    @property
    def whole_steps(self) -> int:
        """Whole optimizer steps in which each comes at least once."""
        return math.ceil(self.examples / self.at_once) * self.again


def one_pass(steps: Steps | MixedSteps | PromptSteps) -> Pass:
    """How long the data of a run is."""
    examples = steps.examples
    apart = examples.stride / examples.ctx_len if isinstance(examples, Slices) else 1.0
    return Pass(len(examples) * apart, steps.passes if isinstance(steps, PromptSteps) else 1, steps.samples_per_step)


def with_pass(config: Config, steps: Steps | MixedSteps | PromptSteps) -> Config:
    """The Config with --epochs as mini-epochs of one pass each, or of --save_steps."""
    if not config.epochs:
        return config
    if not config.save_steps:
        config = dataclasses.replace(config, epoch_steps=one_pass(steps).whole_steps * config.accumulate_grad_batches)
    count = math.ceil(config.epochs * one_pass(steps).whole_steps / config.steps_per_epoch)
    return dataclasses.replace(config, epoch_count=count)


def settings_of(config: Config) -> dict[str, object]:
    """Every setting that differs from its default, for logs."""
    fields = (field for field in dataclasses.fields(config) if field.name != "given")
    return {field.name: value for field in fields if (value := getattr(config, field.name)) != field.default}
