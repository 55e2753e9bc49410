"""Runs cuda/<op>.cu on the CPU, through the same ops/gpu.py and autograd function as on a GPU.

`harnessed(op, ...)` is a kernel whose blocks and threads kernel_host.h executes. Every tensor that it is given lies
between pages that must not be touched, what it shall fill is NaN before, and what it only reads must not change.
"""

import ctypes
import functools
import mmap
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops import backends, calls, gpu
from rwkv_rlhf.ops.build import Recipe, compiler, load

HERE = Path(__file__).resolve().parent
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DRWKV_HOST", "-ffp-contract=fast", "-U_FORTIFY_SOURCE")
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Options(NamedTuple):
    """How blocks and threads are run; see `Options` of kernel_host.h."""

    order: int = 0
    warp: int = 32
    processors: int = 1
    roughness: int = 0
    at_end: bool = True  # tensors end where the forbidden page begins; else they begin where the one before ends


class Guarded:
    """The bytes of a tensor in memory of their own, with a forbidden page on either side."""

    def __init__(self, x: Tensor, at_end: bool) -> None:
        self.count = x.numel() * x.element_size()
        room = -(-self.count // PAGE) * PAGE
        self.memory = mmap.mmap(-1, room + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = base + PAGE + (room - self.count if at_end else 0)
        for edge in (base, base + PAGE + room):
            assert _libc.mprotect(ctypes.c_void_p(edge), PAGE, 0) == 0
        self.tensor = x.detach().clone().contiguous()
        ctypes.memmove(self.address, self.tensor.data_ptr(), self.count)

    def read(self) -> Tensor:
        """What the bytes are now, as a tensor like the first."""
        now = torch.empty_like(self.tensor)
        ctypes.memmove(now.data_ptr(), self.address, self.count)
        return now

    def place(self, address: int) -> str | None:
        """Where an address lies with respect to these bytes, if on one of their forbidden pages."""
        before, after = self.address - address, address - self.address - self.count
        if 0 < before <= 2 * PAGE:
            return f"{before} bytes before its begin"
        return f"{after} bytes after its end" if 0 <= after <= 2 * PAGE else None


class HarnessKernel(gpu.Kernel):
    """A kernel whose C functions run on the CPU, on guarded copies of the tensors."""

    def __init__(self, op: str, functions: ctypes.CDLL, options: Options) -> None:
        super().__init__(op, functions)
        self.options = options

    def _empty(self, shape, dtype, device):
        return torch.full(tuple(shape), float("nan"), dtype=dtype)

    def _like(self, x):
        return self._empty(x.shape, x.dtype, x.device)

    def _run(self, name, given, filled, sizes, dtype):
        order, warp, processors, roughness, at_end = self.options
        self.functions.harness_options(order, warp, processors, roughness)
        tensors = [None if x is None else Guarded(x, at_end) for x in (*given, *filled)]
        addresses = [x.address if x else 0 for x in tensors]
        failure = calls.answer(getattr(self.functions, name), addresses, sizes, dtype, 0, None)
        if failure:
            return failure + self._place(failure, tensors)
        for i, (x, guarded) in enumerate(zip((*given, *filled), tensors, strict=True)):
            if i >= len(given) and x is not None:
                x.copy_(guarded.read())
            elif i < len(given) and not torch.equal(guarded.read().view(torch.uint8), guarded.tensor.view(torch.uint8)):
                return f"it wrote to tensor {i}, which it should only read"
        return None

    @staticmethod
    def _place(failure: str, tensors: Sequence[Guarded | None]) -> str:
        address = int(failure.rpartition("0x")[2], 16) if " at 0x" in failure else 0
        found = [f"tensor {i}, {x.place(address)}" for i, x in enumerate(tensors) if x and x.place(address)]
        return ", near " + " or ".join(found) if found else ""


def recipe(source: Path) -> Recipe:
    """How a .cu file is compiled for the CPU."""
    command, version = compiler()
    includes = (f"-I{HERE}", f"-I{gpu.SOURCES}")
    return Recipe(source, (command, *FLAGS, *includes), (version,), "harness")


@functools.cache
def functions(source: Path) -> ctypes.CDLL:
    """The C functions of a .cu file, compiled for the CPU. Raises BuildError."""
    return load(recipe(source), ctypes.CDLL)


def harnessed(op: str, options: Options | None = None, source: Path | None = None) -> HarnessKernel:
    """cuda/<op>.cu, or another file with the same C functions, on the CPU."""
    return HarnessKernel(op, functions(source or gpu.SOURCES / f"{op}.cu"), options or Options())


@contextmanager
def as_backend(op: str, kernel: gpu.Kernel) -> Iterator[None]:
    """While this lasts, `backend="cuda"` of the op means `kernel`, on tensors of the CPU."""
    cuda = backends.BACKENDS["cuda"]
    refusal, made = cuda.refusal, cuda.kernel
    cuda.refusal = lambda name, *about: None if name == op else refusal(name, *about)
    cuda.kernel = lambda name, *about: kernel if name == op else made(name, *about)
    try:
        yield
    finally:
        cuda.refusal, cuda.kernel = refusal, made


def compiled(recipe: Recipe, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile a recipe with more flags, outside of the cache, for what the compiler says."""
    line = [*recipe.command, *flags, str(recipe.source), "-o", str(target), *recipe.links]
    return subprocess.run(line, capture_output=True, text=True)
