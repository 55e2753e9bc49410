"""Recurrences on an NVIDIA or AMD GPU: cuda/<op>.cu, compiled for the device at hand and called through ctypes.

The sources know nothing of torch (cuda/call.h says what they are given), so a build takes seconds, and the tests can
run them on the CPU.

H heads, N head size, C channels, S rows (packed segments), I checkpoint intervals
"""

import ctypes
import functools
import importlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.ops import backend, calls
from rwkv_rlhf.ops.build import KERNELS, BuildError, Recipe, head_size_flags, load

SOURCES = KERNELS
# No flag that assumes away NaN or infinity; the static runtime, because torch brings one of another version.
NVCC_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
HIPCC_FLAGS = ("-x", "hip", "-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=fast")
# float32 tensors that backward works in, by the words of `kernel.Layout.kept`
SCRATCH: dict[str, tuple[str, ...]] = {
    "wkv4": (),
    "wkv5": ("interval",),  # dL/d(the state after each interval)
    "wkv6": ("interval",),
    "wkv7": ("token", "interval", "token"),  # dL/dsa, dL/d(the state after each interval), sums for the decay
}


class Kernel(calls.Kernel):
    """One recurrence on one GPU: queued on the current stream, nothing waits.

    A RuntimeError with the driver's words may be about an earlier kernel on the device.
    """

    def __init__(self, op: str, functions: ctypes.CDLL) -> None:
        super().__init__(op, functions)
        self.scratch, self.partial = SCRATCH[op], self.layout.vectors

    def _dense(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()  # accesses are of 16 bytes

    def _run(
        self, name: str, given: list[Tensor], filled: Sequence[Tensor | None], sizes: Sequence[int], dtype: int
    ) -> str | None:
        device = given[0].device
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        return calls.call(getattr(self.functions, name), [*given, *filled], sizes, dtype, device.index, stream)


class Backend(backend.Compiled):
    """The recurrences on tensors of a GPU."""

    device_type = "cuda"

    def preference(self, device: torch.device, dtype: torch.dtype) -> int:
        return 20

    def kernel(self, op: str, device: torch.device, head_size: int) -> Kernel:
        return kernel(op, device, head_size)


class Hip(Backend):
    """The same, asked for by AMD's name."""

    def preference(self, device: torch.device, dtype: torch.dtype) -> None:  # type: ignore[override]  # `cuda` is it
        return None

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if torch.version.hip is None:
            return "this PyTorch is not built for ROCm"
        return super().refusal(op, device, dtype, shape)


def kernel(op: str, device: torch.device, head_size: int = 0) -> Kernel:
    """The kernel of `op` for the architecture of `device`, compiled first if no cached binary fits, for one head size.

    Raises BuildError (again on every call: a failed build is not retried within a process).
    """
    if not torch.cuda.is_available():
        raise BuildError("this PyTorch finds no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _kernel(op, index, head_size, SOURCES)
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _kernel(op: str, index: int, head_size: int, sources: Path) -> Kernel | BuildError:
    """An error is a result too; `sources` is part of the key."""
    device = torch.device("cuda", index)
    try:
        functions = load(recipe(op, device, head_size), ctypes.CDLL)
    except BuildError as error:
        return error
    functions.rwkv_probe.restype = ctypes.c_char_p
    failure = functions.rwkv_probe(index)
    if failure is not None:
        return BuildError(f"{sources / f'{op}.cu'} is compiled, but does not run on {device}: {failure.decode()}")
    return Kernel(op, functions)


def recipe(op: str, device: torch.device, head_size: int = 0) -> Recipe:
    """How cuda/<op>.cu is compiled for a device that torch can see, for one head size (0: for all).

    Raises BuildError if a compiler is missing.
    """
    return (hip_recipe if torch.version.hip else cuda_recipe)(op, architecture(device), head_size)


def architecture(device: torch.device) -> str:
    """What the compilers call a GPU: "gfx90a", or for NVIDIA the digits of its compute capability, "90"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "{}{}".format(*torch.cuda.get_device_capability(device))


def cuda_recipe(op: str, capability: str, head_size: int = 0) -> Recipe:
    """For an NVIDIA GPU of a compute capability as in "90". Raises BuildError if there is no nvcc."""
    command = compiler("nvcc")
    code = f"arch=compute_{capability},code=sm_{capability}"
    return _recipe(op, (command,), (*NVCC_FLAGS, "-gencode", code), f"sm_{capability}", head_size)


def hip_recipe(op: str, architecture: str, head_size: int = 0) -> Recipe:
    """For an AMD GPU of an architecture as in "gfx90a". Raises BuildError if there is no hipcc."""
    # With a CUDA toolkit beside it, hipcc would call nvcc.
    command = ("env", "HIP_PLATFORM=amd", compiler("hipcc"))
    return _recipe(op, command, (*HIPCC_FLAGS, f"--offload-arch={architecture}"), architecture, head_size)


def _recipe(op: str, command: Sequence[str], flags: Sequence[str], label: str, head_size: int) -> Recipe:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    label += f"-n{head_size}" * bool(head_size)
    return Recipe(SOURCES / f"{op}.cu", (*command, *flags, *head_size_flags(head_size)), (version,), label)


def compiler(name: str) -> str:
    """Path of "nvcc" or "hipcc" in the toolkit that torch has found, else in PATH. Raises BuildError."""
    variable, toolkit = ("CUDA_HOME", "the CUDA toolkit") if name == "nvcc" else ("ROCM_HOME", "ROCm")
    home = toolkit_folder(variable)
    found = shutil.which(name, path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which(name)
    if found is None:
        raise BuildError(f"no compiler for this GPU: '{name}' was not found (install {toolkit} or set {variable})")
    return found


def toolkit_folder(variable: str) -> str | None:
    """CUDA_HOME or ROCM_HOME as torch finds it, which takes a while and needs setuptools; one without GPUs has none."""
    if not (torch.version.cuda or torch.version.hip):
        return None
    try:
        home: str | None = getattr(importlib.import_module("torch.utils.cpp_extension"), variable)
    except ImportError:
        return None
    return home
