"""Which backend runs an operation, decided in one place and with the reason.

To add a backend: one function that refuses what it cannot do, and one entry in `BACKENDS`.
"""

import ctypes
import functools
import logging
from collections.abc import Callable

import torch

from rwkv_rlhf.ops import calls, cpu, gpu
from rwkv_rlhf.ops.build import BuildError

logger = logging.getLogger(__name__)

# A rule answers None (can do it) or why not, from (op, device, dtype, shape).
Rule = Callable[[str, torch.device, torch.dtype, tuple[int, ...]], str | None]
HEAD_SIZES = (32, 64, 128)


def any_tensor(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Plain PyTorch refuses nothing."""
    return None


def host_library(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The C++ file cuda/cpu/<op>.cpp: CPU tensors in bfloat16 or float32, and a compiler that works."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in calls.DTYPES:
        return f"no kernel for {dtype}"
    return _build_failure(op, "cpu", device)


def host_recurrence(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """As `host_library`, for the head sizes that the kernels are compiled for (last axis of `shape`)."""
    if shape[-1] not in HEAD_SIZES:
        return f"head size {shape[-1]} is not one of {HEAD_SIZES}"
    return host_library(op, device, dtype, shape)


def device_library(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The file cuda/<op>.cu: tensors of a GPU in bfloat16 or float32, and a compiler that works."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if dtype not in calls.DTYPES:
        return f"no kernel for {dtype}"
    return _build_failure(op, "cuda", device)


def device_recurrence(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """As `device_library`, for the head sizes that the kernels are compiled for (last axis of `shape`)."""
    if shape[-1] not in HEAD_SIZES:
        return f"head size {shape[-1]} is not one of {HEAD_SIZES}"
    return device_library(op, device, dtype, shape)


# op -> backend -> rule, the preferred backend first.
BACKENDS: dict[str, dict[str, Rule]] = {
    "wkv4": {"cuda": device_library, "cpu": host_library, "naive": any_tensor},
    "wkv5": {"cuda": device_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "wkv6": {"cuda": device_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "wkv7": {"cuda": device_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "elementwise": {"cpu": host_library, "naive": any_tensor},
    "logprob": {"cpu": host_library, "naive": any_tensor},
}


def choose(
    op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], wanted: str = "auto"
) -> tuple[str, str]:
    """Name the backend that runs `op` on tensors of this device, dtype and shape, and why the others were refused.

    `wanted` is "auto" (the first backend that refuses nothing) or one name, which is then taken or refused with a
    ValueError. Returns (name, reason), the reason being empty when nothing was refused.
    """
    rules = BACKENDS[op]
    if wanted not in ("auto", *rules):
        raise ValueError(f"{op} has no backend '{wanted}'; choose one of {', '.join(('auto', *rules))}")
    refusals = []
    for name, rule in rules.items() if wanted == "auto" else [(wanted, rules[wanted])]:
        refusal = rule(op, device, dtype, shape)
        if refusal is None:
            return name, "; ".join(refusals)
        refusals.append(f"{name}: {refusal}")
    raise ValueError(f"the backend asked for cannot run {op}: {'; '.join(refusals)}")


def kernel(op: str, backend: str, device: torch.device) -> calls.Kernel | ctypes.CDLL:
    """What runs `op` on a backend other than "naive": a `Kernel` for a recurrence, else C functions. Raises BuildError."""
    if backend == "cuda":
        return gpu.kernel(op, device)
    return cpu.recurrence(op) if op in calls.LAYOUTS else cpu.library(op)


@functools.cache
def _build_failure(op: str, backend: str, device: torch.device) -> str | None:
    """Why the kernel of `op` cannot be had, warned about once; None if it can."""
    try:
        kernel(op, backend, device)
    except BuildError as error:
        logger.warning("%s runs as plain PyTorch, which is much slower: %s", op, error)
        return str(error)
    return None
