"""Which backend runs an operation, decided in one place and with the reason.

The backends are those of `settings/tables.py`, `BACKENDS`; ops/backend.py says what each of them can be asked.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rwkv_rlhf.ops import calls, cpu
from rwkv_rlhf.ops.backend import Backend, Compiled, InFloat32, head_size
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import Implementations, load
from rwkv_rlhf.settings.tables import BackendFacts


@functools.cache
def _made(facts: BackendFacts) -> Backend:
    """One object each: every call of an operation asks for them."""
    made: Backend = load(facts.implementation)()
    return made


BACKENDS: Implementations[BackendFacts, Backend] = Implementations(
    tables.BACKENDS, _made, lambda facts: facts.implementation
)


def backends_of(op: str) -> list[str]:
    """The names of all backends that know `op`."""
    return [name for name, backend in BACKENDS.items() if op in backend.ops]


def choose(
    op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], wanted: str = "auto"
) -> tuple[str, str]:
    """Name the backend that runs `op` on tensors of this device, dtype and shape, and why the others were refused.

    `wanted` is "auto" (the first backend that refuses nothing) or one name, which is then taken or refused with a
    ValueError. Returns (name, reason), the reason being empty when nothing was refused.
    """
    if wanted != "auto" and wanted not in backends_of(op):
        raise ValueError(f"{op} has no backend '{wanted}'; choose one of {', '.join(('auto', *backends_of(op)))}")
    refusals: list[str] = []
    for name in candidates(op, device, dtype) if wanted == "auto" else [wanted]:
        refusal = BACKENDS[name].refusal(op, device, dtype, shape)
        if refusal is None:
            return name, "; ".join(refusals)
        refusals.append(f"{name}: {refusal}")
    raise ValueError(f"the backend asked for cannot run {op}: {'; '.join(refusals)}")


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends of `op` in the order in which "auto" asks them."""
    return _candidates(op, device, dtype, tuple(tables.BACKENDS))


@functools.cache
def _candidates(op: str, device: torch.device, dtype: torch.dtype, known: tuple[str, ...]) -> list[str]:
    """Every call of an operation asks for them; `known` is part of the key."""
    ranks = {name: BACKENDS[name].preference(device, dtype) for name in backends_of(op)}
    return sorted((name for name, rank in ranks.items() if rank is not None), key=lambda name: -(ranks[name] or 0))


def prepare(kernels: Sequence[tuple[str, int]], device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> None:
    """Compile side by side what a run will ask for, (op, head size or 0) each, instead of one after the other."""
    if device.type == "cpu" and wanted in ("auto", "cpu") and dtype in (*calls.DTYPES, torch.float16):
        cpu.prepare(kernels)


def kernel(op: str, name: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """What runs `op` on a backend other than "naive", for tensors of this dtype and shape. Raises BuildError."""
    made = BACKENDS[name].kernel(op, device, head_size(op, shape))
    return InFloat32(made) if dtype == torch.float16 and isinstance(BACKENDS[name], Compiled) else made
