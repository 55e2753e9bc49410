"""What a run is, in lines of a label and a text, for the screen and for the page."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_rlhf.data.sampler import MixedSteps, Steps
from rwkv_rlhf.host_cores import host_cores
from rwkv_rlhf.host_memory import host_bytes
from rwkv_rlhf.plan import Plan
from rwkv_rlhf.plan.rows import Row
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.reports.run_facts import RUNNING, RunFacts
from rwkv_rlhf.reports.words import pasted, size
from rwkv_rlhf.rl.loop import PromptSteps
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import PROGRAM, PROGRAM_VERSION, Config
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.length import optimizer_steps, tokens_run
from rwkv_rlhf.training.memory import Estimate, memory_by_part
from rwkv_rlhf.training.out_of_memory import advice
from rwkv_rlhf.training.recipe import length_lines
from rwkv_rlhf.training.start import Start

log = logging.getLogger(__name__)

LOOKED_AT = 32  # micro-batches whose tokens a dry run counts,
FEWER = 4  # and a run, which has the longest row of the files besides
ROOM = 0.95  # of the memory that a machine has, from which on an estimate is too close to it

AnySteps = Steps | MixedSteps | PromptSteps


class StepTokens(NamedTuple):
    """Tokens of a micro-batch: on average, and of the largest that can come."""

    mean: float
    largest: int


def spread(count: int, some: int) -> list[int]:
    """`some` of `count` micro-batches, from the first to the last; samples may grow, and files may be sorted."""
    return sorted({k * (count - 1) // (some - 1) for k in range(some)})


def longest(config: Config, inputs: Inputs) -> int:
    """Tokens of a micro-batch of nothing but the longest row of the files, as far as rows are known."""
    row = inputs.reports[0].longest  # of a pair, the prompt and the longer answer
    return config.micro_bsz * (row if config.pair_file else min(row, config.ctx_len))


def step_tokens(config: Config, inputs: Inputs, steps: AnySteps, some: int = LOOKED_AT) -> StepTokens:
    """How many tokens the micro-batches of a run have, by a look at `some` of them."""
    if isinstance(steps, PromptSteps):
        how = inputs.algorithm.sampling()
        seen = [config.micro_bsz * (inputs.reports[0].longest + how.samples * how.max_tokens)]
    else:
        batches = spread(optimizer_steps(config, steps) * config.accumulate_grad_batches, some)
        seen = [tokens_run(steps.micro_batch(k)) for k in batches]
    return StepTokens(sum(seen) / len(seen), max(*seen, longest(config, inputs)))


class Room(NamedTuple):
    """Bytes that a step will take, by an estimate, and those that the device has (0 = not known)."""

    needed: int
    there: int
    gpu: bool

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves some room."""
        return not self.there or self.needed <= ROOM * self.there

    def __str__(self) -> str:
        if not self.there:
            return f"about {size(self.needed)} (estimate)"
        word = "fits" if self.fits else "may not fit" if self.needed <= self.there else "does not fit"
        return f"about {size(self.needed)} of {size(self.there)} of the {'GPU' if self.gpu else 'machine'}: {word}"


NO_ROOM = Room(0, 0, False)  # where nothing could be estimated


def room_for(config: Config, start: Start, tokens: int) -> Room:
    """The memory of a step over `tokens` tokens beside what the machine has."""
    gpu = device_for(config.accelerator) == "cuda"
    estimate: Estimate = memory_by_part(config, start.model, tokens, gpu=gpu)
    there = torch.cuda.get_device_properties(0).total_memory if gpu else host_bytes()
    beside = 1 if gpu else config.devices  # processes of this machine
    return Room(sum(estimate.device.values()) * beside, there, gpu)


def say_room(config: Config, room: Room) -> None:
    """One line, or a warning with what helps most."""
    if room.fits:
        log.info("memory: %s", room)
    else:
        log.warning("memory: %s. What saves most: %s", room, ", ".join(map(spelled_out, advice(config))))


def refuse_too_large(config: Config, room: Room) -> None:
    """Raises ValueError when a step needs more than the whole GPU by the estimate, unless --force 1 tries it.

    It is only said where the estimate is an upper bound, as the ranks split or offload a part of it or tables have
    moments of few rows, and of a machine without a GPU, which may swap and whose other programs may end.
    """
    facts = tables.STRATEGIES[config.strategy]
    whole = not facts.stage and not facts.whole_blocks and not config.train_tables  # a GPU holds all that is counted
    if room.gpu and whole and room.there and room.needed > room.there and not config.force:
        raise ValueError(
            f"a step takes {room}, by the estimate; what saves most: {', '.join(advice(config))}; {{force}} 1 tries it"
        )


def spelled_out(text: str) -> str:
    """A piece of advice with flags in the place of settings."""
    return text.replace("{", "--").replace("}", "")


def model_line(start: Start) -> str:
    """The model that training begins from."""
    s, layout = start.sizes, start.report.layout
    stored = f", stored as {layout.store}" if layout.packed else ""
    return f"{start.path}: {s.version}, {s.n_layer} layers of width {s.n_embd}, vocabulary {s.vocab_size}{stored}"


def method_line(config: Config, plan: Plan) -> str:
    """What is learnt, and by what."""
    loss = config.loss or tables.PRETRAINING
    adapters = sorted({f"{row.mode} of rank {row.rank}" for row in plan.rows.values() if row.mode in tables.ADAPTERS})
    how = ", ".join(adapters) or ("the learnt state" if plan.states else "whole matrices")
    return f"{loss} with {how}, {config.precision}"


def rate_line(config: Config, plan: Plan) -> str:
    """Learning rates, their shape and the warm-up."""
    rows = [row for row in plan.rows.values() if row.mode != "freeze"]
    pairs = [(row.lr_init, row.lr_final) for row in rows if row.mode != "state"]
    pairs += [(row.state_lr_init, row.state_lr_final) for row in rows if plan.states]
    first, last = max(pairs, default=(config.lr_init, config.lr_final))
    several = "up to " if len(set(pairs)) > 1 else ""
    kind = config.lr_schedule or "exp"
    shape = f"{first:g} (constant)" if kind == "constant" else f"{first:g} -> {last:g} ({kind})"
    warm_up = f"{counted(config.warmup_steps, 'step')} of warm-up" if config.warmup_steps > 0 else "no warm-up"
    return f"{several}{shape}, {warm_up}"


def opening_lines(config: Config, start: Start) -> Iterator[list[str]]:
    """[label, text] of what is known when the model is loaded."""
    yield ["model", model_line(start)]
    yield ["method", method_line(config, start.plan)]
    yield ["learning rate", rate_line(config, start.plan)]


def about_lines(config: Config, start: Start, inputs: Inputs, steps: AnySteps, room: Room) -> Iterator[list[str]]:
    """[label, text] of everything that a person wants to know first."""
    report = start.report
    whole = report.trained + report.frozen
    opening = list(opening_lines(config, start))
    yield from opening[:2]
    yield ["trained", f"{report.trained:,} of {whole:,} parameters ({report.trained / max(1, whole):.2%})"]
    found = [line for known in inputs.reports for line in (known.found or [known.source])]
    yield ["data", "; ".join(found)]
    yield ["length", next(length_lines(config, steps))]
    yield from opening[2:]
    yield ["memory", str(room)]


def begin_facts(facts: RunFacts, config: Config, start: Start, inputs: Inputs, steps: AnySteps) -> Room:
    """Says whether the run fits into memory, and notes for the page what the run is."""
    facts.state, facts.total = RUNNING, optimizer_steps(config, steps)
    facts.plan, facts.versions = plan_rows(start.plan), versions()
    facts.data = [line for report in inputs.reports for line in (*report.lines(), *report.notices)]
    facts.command, facts.directory = pasted(sys.argv), str(Path.cwd())
    room = room_for(config, start, step_tokens(config, inputs, steps, FEWER).largest)
    say_room(config, room)
    facts.about = list(about_lines(config, start, inputs, steps, room))
    return room


def plan_rows(plan: Plan) -> list[dict[str, str]]:
    """The rows of the plan for the page, neighbours that are alike in one."""

    def shown(row: Row) -> tuple[str, ...]:
        if row.mode == "freeze":
            return (row.mode, "", "", "", "")
        adapter = row.mode in tables.ADAPTERS
        rates = f"{row.lr_init:g} -> {row.lr_final:g}"
        return (row.mode, *((f"{row.rank}", f"{row.alpha:g}") if adapter else ("", "")), rates, f"{row.weight_decay:g}")

    found = []
    for about, rows in groupby(plan.rows.values(), shown):
        names = [row.layer for row in rows]
        layers = names[0] if len(names) == 1 else f"{names[0]} - {names[-1]}"
        titles = ("layers", "mode", "rank", "alpha", "learning rate", "weight decay")
        found.append(dict(zip(titles, (layers, *about))))
    return found


def versions() -> dict[str, str]:
    """Program, Python, PyTorch and the machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = f"{platform.system()} {platform.machine()}, {counted(host_cores(), 'core')}, {size(host_bytes())}"
    return {
        PROGRAM: PROGRAM_VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": ", ".join([machine, *gpus]),
    }
