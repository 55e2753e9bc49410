"""What a machine can train: the largest model that fits with LoRA, in which precision, and about how fast."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.reports.words import short_count
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.memory import memory_by_part
from rwkv_rlhf.training.start import shape_model

SHAPES = ((12, 768), (24, 1024), (24, 2048), (32, 2560), (32, 4096), (61, 4096))  # layers, width: published ones
CONTEXT = 1024  # tokens of a row
ROOM = 0.8  # of the memory, as others use the machine too
STORAGES = (("", ("--quant", "0")), (" over nf4", ("--quant", "1", "--quant_mode", "nf4")))
PASSES = 3  # over a frozen matrix: forward, again for the backward pass, and the gradient of its input


class Need(NamedTuple):
    """Of a model that trains with LoRA: bytes of a step, and floating-point operations of one token in the matrices."""

    memory: int
    operations: int


class Fit(NamedTuple):
    """A model that fits, its storage in words, and the operations of one trained token."""

    shape: str
    stored: str
    operations: int


class Machine:
    """What a machine of `memory` bytes trains in `precision`, by the same estimate as a dry run, in rows of CONTEXT."""

    def __init__(self, memory: int, precision: str, *, gpu: bool) -> None:
        self.memory, self.gpu = memory, gpu
        place = "gpu" if gpu else "cpu"
        typed = ["--dry_run", "1", "--dry_run_shape", "L2-D64", "--peft", "lora", "--precision", precision]
        typed += ["--accelerator", place, "--ctx_len", str(CONTEXT), "--data_file", "none.jsonl"]
        self._configs = {stored: parse([*typed, *words]) for stored, words in STORAGES}
        self._two_sizes: dict[tuple[int, str], tuple[Need, Need]] = {}

    def need_of(self, layers: int, width: int, stored: str) -> Need:
        """Of one model, built without numbers."""
        config = dataclasses.replace(self._configs[stored], dry_run_shape=f"L{layers}-D{width}")
        model, _ = shape_model(config)
        weights = sum(layer.shape.numel() for name, layer in matrices(model) if name != "emb")
        memory = memory_by_part(config, model, CONTEXT, gpu=self.gpu).device
        return Need(sum(memory.values()), 2 * PASSES * weights)

    def need_by_layer(self, layers: int, width: int, stored: str) -> Need:
        """The same from two small models, as both numbers grow with each layer by as much; a large one takes long."""
        if (width, stored) not in self._two_sizes:
            self._two_sizes[width, stored] = (self.need_of(2, width, stored), self.need_of(3, width, stored))
        two, three = self._two_sizes[width, stored]
        return Need(*(small + (layers - 2) * (large - small) for small, large in zip(two, three)))

    def fit(self, at: int) -> Fit | None:
        """The model SHAPES[at] with LoRA where it fits, over a packed base only where it must be."""
        layers, width = SHAPES[at]
        for stored, _ in STORAGES:
            need = self.need_by_layer(layers, width, stored)
            if need.memory <= ROOM * self.memory:
                return Fit(f"L{layers}-D{width}", stored, need.operations)
        return None

    def largest(self) -> Fit | None:
        """The largest of SHAPES that fits, looked for by halves."""
        first_without = bisect.bisect_left(range(len(SHAPES)), True, key=lambda at: self.fit(at) is None)
        return self.fit(first_without - 1) if first_without else None


def verdict(memory: int, precision: str, *, gpu: bool, rate: Callable[[], float]) -> str:
    """One sentence. `rate` measures the floating-point operations a second of products in `precision`."""
    machine = Machine(memory, precision, gpu=gpu)
    largest = machine.largest()
    if largest is None:
        layers, width = SHAPES[0]
        return f"use --precision {precision}; L{layers}-D{width} with LoRA does not fit in rows of {CONTEXT} tokens"
    measured = rate()
    smallest = machine.fit(0) or largest
    rates = {one.shape: measured / one.operations for one in (smallest, largest)}
    speeds = ", ".join(
        f"{shape} about {f'{speed:.3g}' if speed < 1000 else short_count(speed)} tokens/s"
        for shape, speed in rates.items()
    )
    return (
        f"use --precision {precision}; {largest.shape} with LoRA{largest.stored} fits in rows of {CONTEXT} tokens; "
        f"by the rate of products {speeds}"
    )
