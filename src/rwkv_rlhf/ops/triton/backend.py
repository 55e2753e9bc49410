"""The backend of Triton: GPUs with bfloat16 units, or a CPU where Triton's interpreter runs.

Importing Triton takes a second and needs it installed, so only `kernel` does.
"""

import functools
import importlib.metadata
from typing import Any

import torch

from rwkv_rlhf.ops import backend
from rwkv_rlhf.ops.compiling import no_starter

OLDEST_TRITON = 3, 6


class Backend(backend.Backend):
    """Every operation but products, which the libraries of a GPU do well; from ops/triton."""

    ops = tuple(op for op in backend.OPERATIONS if op != "products")

    def preference(self, device: torch.device, dtype: torch.dtype) -> int | None:
        """First for 16-bit numbers on a GPU, as its matrix products are the faster way.

        For float32 after the exact kernels, which need a compiler. On a CPU its interpreter is slower than anything.
        """
        if device.type == "cpu":
            return None
        return 30 if dtype in (torch.bfloat16, torch.float16) else 15

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"no kernel for {dtype}"
        if device.type not in ("cpu", "cuda"):
            return f"the tensors are on {device.type}"
        unusual = backend.unusual_size(op, shape) or _missing()
        return unusual or (_no_interpreter() if device.type == "cpu" else too_old(device) or no_starter())

    def kernel(self, op: str, device: torch.device, head_size: int) -> Any:
        from rwkv_rlhf.ops.triton import recurrences

        return recurrences.kernel(op)


@functools.cache
def _missing() -> str | None:
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
def too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run Triton's kernels."""
    if not torch.cuda.is_available():
        return "this PyTorch finds no GPU"
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has compute capability {major}.{minor}, Triton's kernels need 8.0; --wkv_backend cuda runs on it"
