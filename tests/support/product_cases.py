"""Matrices in every way of storing them that products of a few rows know, and their kernel for other processors."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_rlhf.layers.stores.fp8 import FP8
from rwkv_rlhf.layers.stores.int8 import Int8
from rwkv_rlhf.ops import build, calls, cpu
from rwkv_rlhf.ops.products import BLOCK, Packed


def error(found: Tensor, exact: Tensor) -> float:
    """RMS(difference) / RMS(exact)."""
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def stored_matrices(outputs: int, inputs: int) -> Iterator[tuple[str, Tensor | Packed, Tensor]]:
    """Name, a random matrix as it is stored, and what it is in float32 (O, K); packed ones where 64 divide K."""
    weight = torch.randn(outputs, inputs)
    yield "fp32", weight, weight
    yield "bf16", weight.bfloat16(), weight.bfloat16().float()
    if inputs % BLOCK:
        return
    for store in (Int8.pack(weight), FP8.pack(weight)):
        packed = store.operand()
        assert packed is not None
        yield store.mode, packed, store.unpack()
    four = four_bit(outputs, inputs)
    yield "four bits", four, four.dense().view(outputs, inputs)


def four_bit(outputs: int, inputs: int) -> Packed:
    """Every code in both halves of a byte, sixteen levels without an order."""
    count = outputs * inputs
    numbers = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8)
    return Packed(numbers, torch.rand(count // BLOCK) + 0.1, torch.randn(16))


def runnable_sets() -> list[str]:
    """The instruction sets of `build.ISA_FLAGS` that this process can run."""
    sets, flags = build.instruction_sets(), cpu.processor_flags()
    if not cpu.has_matrix_unit():
        sets = [isa for isa in sets if isa != "AMX"]
    return [isa for isa in sets if flags is None or cpu.CPU_FLAGS[isa] <= flags]


def compiled_for(isa: str, name: str = "products") -> ctypes.CDLL:
    """A kernel for an instruction set. Raises BuildError without a compiler."""
    cpu.share_threads()
    return build.load(build.host_recipe(name, isa), ctypes.CDLL)


def use_set(monkeypatch, isa: str) -> None:
    """Products and programs run as on a processor that has this set and no wider one."""
    libraries = {name: compiled_for(isa, name) for name in ("products", "decode")}
    monkeypatch.setattr(cpu, "c_function", lambda name, function: calls.function(libraries[name], function))
