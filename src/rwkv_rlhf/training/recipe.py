"""What a run will do, in a few lines before it does it, and a warning for each part that defeats itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.host_cores import host_cores
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.plan import Plan
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.training.choices import one_pass
from rwkv_rlhf.training.length import optimizer_steps

log = logging.getLogger(__name__)

MANY_PASSES = 20  # over the same examples
LONG_WARMUP = 0.3  # of all steps
HIGH_RATE = 0.01  # of weights; states learn faster
BESIDE = 12  # bytes a trained number: its gradient and Adam's two moments, float32


AnySteps = Steps | MixedSteps | PromptSteps


def say_recipe(config: Config, plan: Plan, sizes: Sizes, trained: int, steps: AnySteps) -> None:
    """Logs the length of the run in passes over its examples, and what is odd about it. `trained`: parameters."""
    for line in length_lines(config, steps):
        log.info("%s", line)
    if config.peft == "full" and not config.layer_profile and not config.state:
        log.info(
            "without --peft and --layer_profile everything trains: %s parameters, %.1f GiB of gradients and moments",
            *(f"{trained:,}", trained * BESIDE / (1 << 30)),
        )
    for sentence in (*odd_length(config, steps), *odd_values(config, plan, sizes), *unheard(config, plan)):
        log.warning("%s", sentence)


def passes(config: Config, steps: AnySteps) -> float:
    """How often the run sees each example (of a corpus, each token) on average."""
    return optimizer_steps(config, steps) / one_pass(steps).steps


def length_lines(config: Config, steps: AnySteps) -> Iterator[str]:
    """The length of the run."""
    total, often = optimizer_steps(config, steps), passes(config, steps)
    warmup = config.warmup_steps
    warm_up = f", {warmup:,} of them warm-up ({min(1.0, warmup / total):.0%})" if warmup > 0 else ""
    whole = one_pass(steps).steps
    a_pass = f"{whole:,.1f}" if whole >= 1 else f"{whole:.2g}"
    yield (
        f"{counted(len(steps.examples), 'example')}, {a_pass} optimizer steps a pass; "
        f"{counted(total, 'step')} {'is' if total == 1 else 'are'} {counted(often, 'pass', 'passes')}{warm_up}"
    )


def odd_length(config: Config, steps: AnySteps) -> Iterator[str]:
    """Warnings about how long the run is."""
    total, often = optimizer_steps(config, steps), passes(config, steps)
    if often > MANY_PASSES and not isinstance(steps, PromptSteps):  # whose answers are new in each pass
        yield f"{often:,.0f} passes over the same examples: they will be learnt by heart; --epochs 3 is three passes"
    if config.warmup_steps > LONG_WARMUP * total:
        share = min(1.0, config.warmup_steps / total)
        whole = counted(total, "step")
        yield f"--warmup_steps {config.warmup_steps} is {share:.0%} of {whole}: most train at a smaller rate"
    if config.micro_bsz > len(steps.examples):
        examples = counted(len(steps.examples), "example")
        yield f"--micro_bsz {config.micro_bsz} is more than the {examples}: some come twice"


def odd_values(config: Config, plan: Plan, sizes: Sizes) -> Iterator[str]:
    """Warnings about numbers that are legal and hardly meant."""
    rows = [row for row in plan.rows.values() if row.mode != "freeze"]
    rate = max((row.lr_init for row in rows), default=0.0)
    if rate > HIGH_RATE:
        yield f"a learning rate of {rate:g} for weights is very high: 1e-5 to 1e-3 is usual"
    wide = [row for row in rows if row.mode in tables.ADAPTERS and row.rank > sizes.n_embd]
    if wide:
        yield f"rank {wide[0].rank} is more than the width of the model, {sizes.n_embd}: full training costs less"
    cores = host_cores()
    if device_for(config.accelerator) == "cpu" and config.devices > cores:
        yield f"--devices {config.devices} on a CPU of {cores} cores: the processes take turns"


def unheard(config: Config, plan: Plan) -> Iterator[str]:
    """A sentence for each typed number that the layer profile overrides."""
    if not config.layer_profile or not config.lr_advanced:
        return
    rows = [row for row in plan.rows.values() if row.mode != "freeze" and row.where]
    for name in ("lr_init", "lr_final", "weight_decay"):
        own = sorted({getattr(row, name) for row in rows})
        if name in config.given and own and own != [getattr(config, name)]:
            some = ", ".join(f"{value:g}" for value in own[:3]) + (", ..." if len(own) > 3 else "")
            head = plan.rows.get(plan.scalar_head)
            alone = head is not None and not head.where and name != "weight_decay"
            effect = f"holds for {plan.scalar_head} only" if alone else "has no effect"
            yield (
                f"--{name} {getattr(config, name):g} {effect}: {config.layer_profile} has its own ({some}); "
                "--lr_advanced 0 takes the flags"
            )
