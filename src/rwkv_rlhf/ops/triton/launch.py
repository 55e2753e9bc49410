"""What every launch needs: where kernels run, and tensors as they take them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as TRITON_INTERPRET=1 says."""
    return bool(triton.knobs.runtime.interpret)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of a CPU, where programs run one after the other."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def dense(x: Tensor) -> Tensor:
    """x contiguous; float32 in the interpreter, which does not compute in bfloat16."""
    return x.float().contiguous() if x.device.type == "cpu" else x.contiguous()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that Triton launches on."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)
