"""Which backend runs an operation, decided in one place and with the reason.

To add a backend: one function that refuses what it cannot do, and one entry in `BACKENDS`.
"""

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rwkv_rlhf.ops import calls, cpu, gpu
from rwkv_rlhf.ops.build import BuildError

logger = logging.getLogger(__name__)

# A rule answers None (can do it) or why not, from (op, device, dtype, shape).
Rule = Callable[[str, torch.device, torch.dtype, tuple[int, ...]], str | None]
HEAD_SIZES = (32, 64, 128)
OLDEST_TRITON = 3, 6


def any_tensor(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Plain PyTorch refuses nothing."""
    return None


def host_library(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The C++ file cuda/cpu/<op>.cpp: CPU tensors in bfloat16 or float32, and a compiler that works."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in calls.DTYPES:
        return f"no kernel for {dtype}"
    return _build_failure(op, "cpu", device, head_size(op, shape))


def device_library(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The file cuda/<op>.cu: tensors of a GPU in bfloat16 or float32, and a compiler that works."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if dtype not in calls.DTYPES:
        return f"no kernel for {dtype}"
    return _build_failure(op, "cuda", device, head_size(op, shape))


def triton_kernels(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """ops/triton: tensors of a GPU with bfloat16 units, or of a CPU where Triton's interpreter runs."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}"
    return _triton_missing() or (_no_interpreter() if device.type == "cpu" else _too_old(device))


def of_heads(rule: Rule) -> Rule:
    """`rule`, for the head sizes that the kernels are compiled for and tested with (last axis of `shape`)."""

    def checked(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if shape[-1] not in HEAD_SIZES:
            return f"head size {shape[-1]} is not one of {HEAD_SIZES}"
        return rule(op, device, dtype, shape)

    return checked


host_recurrence, device_recurrence, triton_recurrence = map(of_heads, (host_library, device_library, triton_kernels))

# op -> backend -> rule, the preferred backend first; see `candidates` for Triton's place.
BACKENDS: dict[str, dict[str, Rule]] = {
    "wkv4": {"cuda": device_library, "triton": triton_kernels, "cpu": host_library, "naive": any_tensor},
    "wkv5": {"cuda": device_recurrence, "triton": triton_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "wkv6": {"cuda": device_recurrence, "triton": triton_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "wkv7": {"cuda": device_recurrence, "triton": triton_recurrence, "cpu": host_recurrence, "naive": any_tensor},
    "elementwise": {"triton": triton_kernels, "cpu": host_library, "naive": any_tensor},
    "logprob": {"triton": triton_kernels, "cpu": host_library, "naive": any_tensor},
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
    refusals: list[str] = []
    for name in candidates(op, device, dtype) if wanted == "auto" else [wanted]:
        refusal = rules[name](op, device, dtype, shape)
        if refusal is None:
            return name, "; ".join(refusals)
        refusals.append(f"{name}: {refusal}")
    raise ValueError(f"the backend asked for cannot run {op}: {'; '.join(refusals)}")


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends of `op` in the order in which "auto" asks them.

    With 16-bit numbers on a GPU Triton comes first: it needs no compiler and its matrix products are the faster way.
    With float32 the exact kernels do, and Triton replaces them where there is no compiler. On a CPU Triton's
    interpreter is slower than anything and runs only where it is asked for by name.
    """
    names = [name for name in BACKENDS[op] if name != "triton" or device.type != "cpu"]
    if "triton" in names and dtype in (torch.bfloat16, torch.float16):
        names.remove("triton")
        names.insert(0, "triton")
    return names


def head_size(op: str, shape: Sequence[int]) -> int:
    """What a kernel of `op` must be compiled for to take tensors of this shape; 0 where there are no heads."""
    return shape[-1] if op in calls.LAYOUTS and len(shape) == 4 else 0


def prepare(kernels: Sequence[tuple[str, int]], device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> None:
    """Compile side by side what a run will ask for, (op, head size or 0) each, instead of one after the other."""
    if device.type == "cpu" and wanted in ("auto", "cpu") and dtype in calls.DTYPES:
        cpu.prepare(kernels)


def kernel(op: str, backend: str, device: torch.device, size: int = 0) -> Any:
    """What runs `op` on a backend other than "naive": a kernel of the recurrence for a head size, else C functions.

    Raises BuildError.
    """
    if backend == "triton":
        from rwkv_rlhf.ops.triton import recurrences  # importing Triton takes a second, and needs it installed

        return recurrences.kernel(op)
    if backend == "cuda":
        return gpu.kernel(op, device, size)
    return cpu.recurrence(op, size) if op in calls.LAYOUTS else cpu.library(op)


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton cannot be used on this machine at all."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton; it comes with PyTorch for Linux with CUDA or ROCm)"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old; {'.'.join(map(str, OLDEST_TRITON))} is the oldest that is known to work"
    return None


def _no_interpreter() -> str | None:
    """Why Triton cannot run on a CPU."""
    import triton

    if triton.knobs.runtime.interpret:
        return None
    return "the tensors are on the CPU, where Triton runs only in its slow interpreter (set TRITON_INTERPRET=1)"


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run Triton's kernels."""
    if not torch.cuda.is_available():
        return "this PyTorch finds no GPU"
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has compute capability {major}.{minor}, Triton's kernels need 8.0; --wkv_backend cuda runs on it"


@functools.cache
def _build_failure(op: str, backend: str, device: torch.device, size: int) -> str | None:
    """Why the kernel of `op` cannot be had, warned about once; None if it can."""
    try:
        kernel(op, backend, device, size)
    except BuildError as error:
        logger.warning("%s runs as plain PyTorch, which is much slower: %s", op, error)
        return str(error)
    return None
