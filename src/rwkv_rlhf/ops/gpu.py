"""Recurrences on an NVIDIA or AMD GPU: cuda/<op>.cu, compiled for the device at hand and called through ctypes.

The sources know nothing of torch (cuda/device.h says what they are given), so a build takes seconds, and the tests can
run them on the CPU. All memory is allocated here.

T tokens of all rows, C channels, H heads, N head size, S rows (packed segments), I checkpoint intervals
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

from rwkv_rlhf.ops.build import KERNELS, BuildError, Recipe, load, once

SOURCES = KERNELS
# No flag that assumes away NaN or infinity; the static runtime, because torch brings one of another version.
NVCC_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
HIPCC_FLAGS = ("-x", "hip", "-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=fast")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Layout(NamedTuple):
    """The tensors of an op besides its arguments and results, all float32 and in the order of the C functions.

    "token": shaped like a per-token input, (T, H, N) or (T, C); "interval": a state for each checkpoint, (I, H, N, N)
    or (I, C, 3).
    """

    kept: tuple[str, ...]  # from forward for backward
    scratch: tuple[str, ...]  # within backward
    # Trailing inputs that all tokens share: their gradients come as one for each interval, (I, H, N) or (I, C) in
    # float32, and are summed here.
    vectors: int = 0
    interval: int = 64  # tokens between checkpoints; the kernels are compiled for it


LAYOUTS = {
    # the sums before each interval
    "wkv4": Layout(kept=("interval",), scratch=(), vectors=2, interval=32),
    # the state before each interval | dL/d(the state after each interval)
    "wkv5": Layout(kept=("interval",), scratch=("interval",), vectors=2),
    "wkv6": Layout(kept=("interval",), scratch=("interval",), vectors=1),
    # the state before each interval, sa | dL/dsa, dL/d(the state after each interval), sums for the decay
    "wkv7": Layout(kept=("interval", "token"), scratch=("token", "interval", "token")),
}


class Kernel:
    """One recurrence on one device: `forward` and `backward` as ops/recurrence.py asks for them.

    Inputs are float32 or bfloat16, vectors and states float32; strides are free. Raises RuntimeError with the text of
    the driver if a launch fails; an error of an earlier kernel on the device can be reported here, too.
    """

    def __init__(self, op: str, functions: ctypes.CDLL) -> None:
        self.layout = LAYOUTS[op]
        self.functions = functions
        for function in (functions.rwkv_forward, functions.rwkv_backward):
            function.restype = ctypes.c_char_p
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)

    def forward(self, inputs: Sequence[Tensor], state: Tensor, starts: Tensor, keep: bool) -> list[Tensor]:
        """y, the final state, and if `keep` what backward needs. starts: (S+1,) int64 on the CPU."""
        first, layout = inputs[0], self.layout
        places, intervals = self._places(starts, first.device)
        kept = self._beside(layout.kept, first, state, intervals) if keep else [None] * len(layout.kept)
        results = [self._empty(x.shape, x.dtype, x.device) for x in (first, state)]
        self._call("rwkv_forward", [*inputs, state, places], [*results, *kept], first, state, intervals)
        return [*results, *kept, places] if keep else results

    def backward(
        self, inputs: Sequence[Tensor], kept: Sequence[Tensor], starts: Tensor, dy: Tensor, dlast: Tensor
    ) -> list[Tensor]:
        """Gradients of the inputs, in their dtypes, and of the initial state."""
        first, layout = inputs[0], self.layout
        intervals = _intervals(starts, layout.interval)[-1].item()
        shapes = [x.shape for x in inputs]
        for i in range(len(inputs) - layout.vectors, len(inputs)):
            shapes[i] = (intervals, *shapes[i])
        grads = [self._empty(shape, x.dtype, x.device) for shape, x in zip(shapes, inputs, strict=True)]
        grads.append(self._empty(dlast.shape, dlast.dtype, dlast.device))
        scratch = self._beside(layout.scratch, first, dlast, intervals)
        self._call("rwkv_backward", [*inputs, *kept, dy, dlast], [*grads, *scratch], first, dlast, intervals)
        return [grad if grad.dim() == x.dim() else grad.sum(0) for grad, x in zip(grads, [*inputs, dlast], strict=True)]

    def _places(self, starts: Tensor, device: torch.device) -> tuple[Tensor, int]:
        """Where rows begin, among tokens and among intervals, and the longest rows first: (3, S+1); and I."""
        marks = _intervals(starts, self.layout.interval)
        order = torch.cat([starts.diff().argsort(descending=True, stable=True), starts.new_zeros(1)])
        return torch.stack([starts, marks, order]).to(device, non_blocking=True), int(marks[-1])

    def _beside(self, kinds: Sequence[str], token: Tensor, state: Tensor, intervals: int) -> list[Tensor]:
        """The tensors of a `Layout`."""
        shapes = {"token": token.shape, "interval": (intervals, *state.shape[1:])}
        return [self._empty(shapes[kind], torch.float32, token.device) for kind in kinds]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that a kernel fills."""
        return torch.empty(shape, dtype=dtype, device=device)

    def _call(
        self,
        name: str,
        given: Sequence[Tensor],
        filled: Sequence[Tensor | None],
        token: Tensor,
        state: Tensor,
        intervals: int,
    ) -> None:
        """Run a C function on tensors that it reads and tensors that it fills; sizes come from `token` and `state`."""
        heads = token.shape[1] if token.dim() == 3 else 1
        sizes = (token.shape[0], state.shape[0], heads, token.shape[-1], intervals, self.layout.interval)
        failure = self._run(name, [_dense(x) for x in given], filled, sizes, DTYPES[token.dtype])
        if failure:
            raise RuntimeError(f"{name} on {token.device}: {failure}")

    def _run(
        self, name: str, given: list[Tensor], filled: Sequence[Tensor | None], sizes: Sequence[int], dtype: int
    ) -> str | None:
        """Queue a C function on the current stream; what it answers."""
        device = given[0].device
        pointers = [0 if x is None else x.data_ptr() for x in (*given, *filled)]
        return self._answer(name, pointers, sizes, dtype, device.index, torch.cuda.current_stream(device).cuda_stream)

    def _answer(
        self, name: str, pointers: Sequence[int], sizes: Sequence[int], dtype: int, device: int, stream: int
    ) -> str | None:
        """Call a C function of cuda/device.h; None, or its error."""
        tensors = (ctypes.c_void_p * len(pointers))(*pointers)
        numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        failure = getattr(self.functions, name)(tensors, numbers, dtype, device, stream)
        return None if failure is None else failure.decode()


def kernel(op: str, device: torch.device) -> Kernel:
    """The kernel of `op` for the architecture of `device`, compiled first if no cached binary fits.

    Raises BuildError (again on every call: a failed build is not retried within a process).
    """

    def make() -> Kernel:
        functions = load(recipe(op, device), ctypes.CDLL)
        functions.rwkv_probe.restype = ctypes.c_char_p
        failure = functions.rwkv_probe(index)
        if failure is not None:
            raise BuildError(f"{SOURCES / f'{op}.cu'} is compiled, but does not run on {device}: {failure.decode()}")
        return Kernel(op, functions)

    if not torch.cuda.is_available():
        raise BuildError("this PyTorch finds no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    return once((op, index, SOURCES), make)


def recipe(op: str, device: torch.device) -> Recipe:
    """How cuda/<op>.cu is compiled for a device that torch can see. Raises BuildError if a compiler is missing."""
    return (hip_recipe if torch.version.hip else cuda_recipe)(op, architecture(device))


def architecture(device: torch.device) -> str:
    """What the compilers call a GPU: "gfx90a", or for NVIDIA the digits of its compute capability, "90"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "{}{}".format(*torch.cuda.get_device_capability(device))


def cuda_recipe(op: str, capability: str) -> Recipe:
    """For an NVIDIA GPU of a compute capability as in "90". Raises BuildError if there is no nvcc."""
    command = compiler("nvcc")
    code = f"arch=compute_{capability},code=sm_{capability}"
    return _recipe(op, (command,), (*NVCC_FLAGS, "-gencode", code), f"sm_{capability}")


def hip_recipe(op: str, architecture: str) -> Recipe:
    """For an AMD GPU of an architecture as in "gfx90a". Raises BuildError if there is no hipcc."""
    # With a CUDA toolkit beside it, hipcc would call nvcc.
    command = ("env", "HIP_PLATFORM=amd", compiler("hipcc"))
    return _recipe(op, command, (*HIPCC_FLAGS, f"--offload-arch={architecture}"), architecture)


def _recipe(op: str, command: Sequence[str], flags: Sequence[str], label: str) -> Recipe:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    headers = sorted(SOURCES.glob("*.h"))
    return Recipe(SOURCES / f"{op}.cu", headers, (*command, *flags), links=(), depends=(version,), label=label)


def compiler(name: str) -> str:
    """Path of "nvcc" or "hipcc" in the toolkit that torch has found, else in PATH. Raises BuildError."""
    home = cpp_extension.CUDA_HOME if name == "nvcc" else cpp_extension.ROCM_HOME
    remedy = "install the CUDA toolkit or set CUDA_HOME" if name == "nvcc" else "install ROCm or set ROCM_HOME"
    found = shutil.which(name, path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which(name)
    if found is None:
        raise BuildError(f"no compiler for this GPU: '{name}' was not found ({remedy})")
    return found


def _intervals(starts: Tensor, interval: int) -> Tensor:
    """Checkpoint intervals before each row, and of all: (S+1,)."""
    counts = (starts.diff() + interval - 1) // interval
    return torch.cat([starts.new_zeros(1), counts.cumsum(0)])


def _dense(x: Tensor) -> Tensor:
    """x contiguous and from an address that allows accesses of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
