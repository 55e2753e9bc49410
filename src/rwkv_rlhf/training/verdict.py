"""What a machine can train: the largest model that fits with LoRA, in which precision, and about how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def need_of(layers: int, width: int, words: Sequence[str], precision: str, *, gpu: bool) -> Need:
    """By the same estimate as a dry run, in rows of CONTEXT tokens."""
    place, shape = "gpu" if gpu else "cpu", f"L{layers}-D{width}"
    typed = ["--dry_run", "1", "--dry_run_shape", shape, "--peft", "lora", "--precision", precision, *words]
    config = parse([*typed, "--accelerator", place, "--ctx_len", str(CONTEXT), "--data_file", "none.jsonl"])
    model, _ = shape_model(config)
    weights = sum(layer.shape.numel() for name, layer in matrices(model) if name != "emb")
    memory = memory_by_part(config, model, CONTEXT, gpu=gpu).device
    return Need(sum(memory.values()), 2 * PASSES * weights)


def need_by_layer(layers: int, width: int, words: Sequence[str], precision: str, *, gpu: bool) -> Need:
    """The same from two small models, as both numbers grow with each layer by as much: a large one takes seconds."""
    two, three = (need_of(few, width, words, precision, gpu=gpu) for few in (2, 3))
    return Need(*(small + (layers - 2) * (large - small) for small, large in zip(two, three)))


def fits(memory: int, precision: str, *, gpu: bool) -> Iterator[Fit]:
    """The models that fit into `memory` bytes with LoRA, the smallest first; a packed base only where it must be."""
    for layers, width in SHAPES:
        for stored, words in STORAGES:
            need = need_by_layer(layers, width, words, precision, gpu=gpu)
            if need.memory <= ROOM * memory:
                yield Fit(f"L{layers}-D{width}", stored, need.operations)
                break
        else:
            return


def verdict(memory: int, precision: str, *, gpu: bool, rate: Callable[[], float]) -> str:
    """One sentence. `rate` measures the floating-point operations a second of products in `precision`."""
    found = list(fits(memory, precision, gpu=gpu))
    if not found:
        layers, width = SHAPES[0]
        return f"use --precision {precision}; L{layers}-D{width} with LoRA does not fit in rows of {CONTEXT} tokens"
    measured = rate()
    rates = {one.shape: measured / one.operations for one in (found[0], found[-1])}
    speeds = ", ".join(
        f"{shape} about {f'{speed:.3g}' if speed < 1000 else short_count(speed)} tokens/s"
        for shape, speed in rates.items()
    )
    return (
        f"use --precision {precision}; {found[-1].shape} with LoRA{found[-1].stored} fits in rows of {CONTEXT} tokens; "
        f"by the rate of products {speeds}"
    )
