"""Kernels on the CPU: cuda/cpu/<name>.cpp, compiled for the instruction set at hand and called through ctypes.

A wheel brings them compiled; a clone compiles them on first use (ops/build.py). They run on the threads of the OpenMP
library that torch has loaded, as many as torch.get_num_threads() says.
"""

import contextlib
import ctypes
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.ops import backend, build, calls
from rwkv_rlhf.ops.build import BuildError

logger = logging.getLogger(__name__)

# what Linux calls the instructions that the compilers' x86-64-v3 and x86-64-v4 stand for
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
CPU_FLAGS: dict[str, set[str]] = {
    "AMX": _V4 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "AVX512": _V4,
    "AVX2": _V3,
    "DEFAULT": set(),
}
CPU_INFO = Path("/proc/cpuinfo")
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # numbers of Linux on x86-64
MAPS = Path("/proc/self/maps")


class Kernel(calls.Kernel):
    """One recurrence on the CPU."""

    def _run(
        self, name: str, given: list[Tensor], filled: Sequence[Tensor | None], sizes: Sequence[int], dtype: int
    ) -> str | None:
        return calls.call(getattr(self.functions, name), [*given, *filled], sizes, dtype, torch.get_num_threads())


def call(
    name: str,
    function: str,
    dtype: torch.dtype,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    *settings: object,
) -> None:
    """Run a C function of cuda/cpu/<name>.cpp on dense tensors, whose activations have this dtype.

    Raises RuntimeError with the function's own words if it refuses.
    """
    run, threads = c_function(name, function), torch.get_num_threads()
    failure = calls.call(run, tensors, sizes, calls.DTYPES[dtype], threads, *settings)
    if failure:
        raise RuntimeError(f"{name}: {failure}")


def c_function(name: str, function: str) -> Callable[..., Any]:
    """A C function of cuda/cpu/<name>.cpp. Raises BuildError as `library`."""
    return _function(name, function, build.SOURCES)


class Backend(backend.Compiled):
    """Every operation on CPU tensors."""

    ops = backend.OPERATIONS
    device_type = "cpu"

    def preference(self, device: torch.device, dtype: torch.dtype) -> int:
        return 10

    def kernel(self, op: str, device: torch.device, head_size: int) -> Any:
        return kernel(op, device, head_size)


def kernel(op: str, device: torch.device, head_size: int) -> Any:
    """The recurrence, or the C functions of another op. Raises BuildError as `library`."""
    return recurrence(op, head_size) if op in calls.LAYOUTS else library(op)


def recurrence(op: str, head_size: int = 0) -> Kernel:
    """The recurrence `op`. Raises BuildError as `library`."""
    return _recurrence(op, library(op, head_size))


def library(name: str, head_size: int = 0) -> ctypes.CDLL:
    """cuda/cpu/<name>.cpp from the wheel, else from the cache, else compiled now for one head size (0: for all).

    Raises BuildError (again on every call: a failed build is not retried within a process).
    """
    found = _library(name, head_size, build.SOURCES)
    if isinstance(found, BuildError):
        raise found
    return found


def prepare(kernels: Sequence[tuple[str, int]]) -> None:
    """Compile side by side what is missing of (name, head size or 0); why one failed is told to who asks for it."""
    isa = instruction_set()
    with contextlib.suppress(BuildError):
        build.binaries([build.host_recipe(name, isa, n) for name, n in kernels if build.packaged(name, isa) is None])


def instruction_set() -> str:
    """The widest of `build.ISA_FLAGS` that this processor has and torch uses too (ATEN_CPU_CAPABILITY lowers it)."""
    sets = build.instruction_sets()
    capability = torch.backends.cpu.get_cpu_capability()
    used = sets.index(capability if capability in sets else "DEFAULT")
    if capability == "AVX512" and "AMX" in sets and has_matrix_unit():  # which torch has no name for
        return "AMX"
    flags = processor_flags()
    return next(isa for isa in sets[used:] if flags is None or CPU_FLAGS[isa] <= flags)


def has_matrix_unit() -> bool:
    """Whether this process may run kernels of the set AMX: the processor has it, and Linux grants its registers."""
    flags = processor_flags()
    return flags is not None and CPU_FLAGS["AMX"] <= flags and _tiles_granted()


@functools.cache
def _tiles_granted() -> bool:
    """Linux keeps the 8 KiB of the matrix unit's registers only for processes that asked: arch_prctl on x86-64."""
    try:
        granted: int = ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
    except (AttributeError, OSError):
        return False
    return granted == 0


def processor_flags() -> set[str] | None:
    """Instructions of the first processor by Linux' names; None where it does not say."""
    try:
        found = re.search(r"^flags\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return set(found[1].split()) if found else None


@functools.cache
def _function(name: str, function: str, sources: Path) -> Callable[..., Any]:
    return calls.function(library(name), function)


@functools.cache
def _recurrence(op: str, functions: ctypes.CDLL) -> Kernel:
    return Kernel(op, functions)


@functools.cache
def _library(name: str, head_size: int, sources: Path) -> ctypes.CDLL | BuildError:
    """An error is a result too; `sources` is part of the key."""
    share_threads()
    isa = instruction_set()
    path = build.packaged(name, isa)
    if path is not None:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("the compiled kernel %s of this installation does not load: %s", path, error)
    failure = BuildError(name)
    for kind in (isa, "AVX512") if isa == "AMX" else (isa,):  # compilers before GCC 11 do not know AMX
        try:
            return build.load(build.host_recipe(name, kind, head_size), ctypes.CDLL)
        except BuildError as error:
            failure = error
    return failure


@functools.cache
def share_threads() -> None:
    """See to it that kernels find the OpenMP library that torch has loaded: its functions must be global."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    try:
        text = MAPS.read_text()
    except OSError:
        text = ""
    for path in dict.fromkeys(re.findall(r"\S*/lib(?:gomp|omp|iomp5)\S*\.so\S*", text)):
        if hasattr(ctypes.CDLL(path, ctypes.RTLD_GLOBAL), "GOMP_parallel"):
            return
    logger.warning("PyTorch has loaded no OpenMP library here: kernels run on one thread")
