"""How long a run is, in optimizer steps and in tokens. Here is no Lightning: a dry run says it too."""

from __future__ import annotations

import math

from rwkv_rlhf.data.batch import Batch, PairBatch, RatedBatch, TextBatch
from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings.config import RWKV_LM, Config
from rwkv_rlhf.training.choices import one_pass
from rwkv_rlhf.training.schedule import Schedule


def micro_batches_per_epoch(config: Config) -> int:
    """--epoch_steps rounded up to whole optimizer steps."""
    return config.steps_per_epoch * config.accumulate_grad_batches


def optimizer_steps(config: Config, steps: Steps | MixedSteps | PromptSteps) -> int:
    """Optimizer steps of this run: --epoch_count mini-epochs, or fewer where --epochs or --my_exit_tokens end it.

    Those tokens are counted from the first mini-epoch on, also by a run that begins later. Raises ValueError when none
    are left.
    """
    count = config.steps_per_epoch * config.epoch_count
    if config.epochs:
        count = min(count, math.ceil(config.epochs * one_pass(steps).whole_steps))
    if config.my_exit_tokens > 0:
        whole = steps_of_tokens(config, steps)
        count = min(count, whole - config.steps_per_epoch * config.epoch_begin)
        if count <= 0:
            raise ValueError(
                f"--my_exit_tokens {config.my_exit_tokens} are {whole} optimizer steps, and mini-epoch "
                f"{config.epoch_begin} comes after them: nothing is left to train"
            )
    return count


def steps_of_tokens(config: Config, steps: Steps | MixedSteps | PromptSteps) -> int:
    """Optimizer steps from the very start of training that --my_exit_tokens are."""
    examples = min(len(steps.examples), 10_000)
    mean = sum(steps.examples.trained(index) for index in range(examples)) / examples
    return math.ceil(config.my_exit_tokens / (mean * steps.samples_per_step))


def schedule_of(config: Config, steps: Steps | MixedSteps | PromptSteps) -> Schedule:
    """The schedule of this run and of what --epoch_begin says is done."""
    done = config.steps_per_epoch * config.epoch_begin
    by_tokens = config.lr_schedule == RWKV_LM and config.my_exit_tokens > 0  # also beyond the end of this run
    total = steps_of_tokens(config, steps) if by_tokens else done + optimizer_steps(config, steps)
    return Schedule(config.warmup_steps, total, config.lr_schedule or "exp", offset=done)


def tokens_run(batch: Batch) -> int:
    """Tokens that go through the model: prompts once, every answer, and the text or the answers beside them."""
    if isinstance(batch, TextBatch):
        return batch.tokens.numel()
    own = batch.prompts.numel() + batch.answers.numel()
    if isinstance(batch, PairBatch) and batch.general is not None:
        return own + tokens_run(batch.general)
    return own + sum(map(tokens_run, batch.others)) if isinstance(batch, RatedBatch) else own
