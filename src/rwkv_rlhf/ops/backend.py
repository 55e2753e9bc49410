"""What every backend is: `settings/tables.py`, `BACKENDS`, names one subclass each, in a module of its own."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.ops.build import BuildError
from rwkv_rlhf.ops.calls import DTYPES

logger = logging.getLogger(__name__)

RECURRENCES = ("wkv4", "wkv5", "wkv6", "wkv7")
OPERATIONS = (*RECURRENCES, "elementwise", "logprob", "products")
HEAD_SIZES = (32, 64, 128)  # that kernels are compiled for and tested with


class Backend:
    """One way to run operations.

    A recurrence's kernel has `forward` and `backward`; ops/recurrence.py says with what they are called and what they
    give. With `own_gradient` it is one differentiable function instead: (inputs and vectors, state, starts) -> (y,
    final state). What runs the other operations is known to ops/elementwise.py, ops/logprob.py
    and ops/products.py.
    """

    ops: tuple[str, ...] = RECURRENCES
    own_gradient = False

    def preference(self, device: torch.device, dtype: torch.dtype) -> int | None:
        """ "auto" asks the backend with the largest number first; None: it runs only where it is asked for by name."""
        return None

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        """Why it cannot run `op` on tensors like this per-token input; None if it can."""
        raise NotImplementedError

    def kernel(self, op: str, device: torch.device, head_size: int) -> Any:
        """What runs `op`; `head_size` is 0 where there are no heads. Raises BuildError."""
        raise NotImplementedError


class Compiled(Backend):
    """Kernels in C++ for one type of device: bfloat16, float32 or (recurrences, `InFloat32`) float16, and a binary that
    is there or can be compiled."""

    device_type: str

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if device.type != self.device_type:
            return f"the tensors are on {device}"
        if dtype not in DTYPES and not (dtype == torch.float16 and op in RECURRENCES):
            return f"no kernel for {dtype}"
        return unusual_size(op, shape) or build_failure(self, op, device, head_size(op, shape))


class InFloat32:
    """A compiled recurrence for float16 tensors, which are widened before it and its results rounded after it: its
    arithmetic is float32 in any case."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def forward(self, inputs: Sequence[Tensor], state: Tensor, starts: Sequence[int], keep: bool) -> list[Tensor]:
        """As ops/recurrence.py says; y is float16."""
        y, *rest = self.kernel.forward([x.float() for x in inputs], state, starts, keep)
        return [y.half(), *rest]

    def backward(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], dy: Tensor, dlast: Tensor) -> list[Tensor]:
        """As ops/recurrence.py says; each gradient has the dtype of its input."""
        *grads, dstate = self.kernel.backward([x.float() for x in inputs], kept, dy.float(), dlast)
        return [*(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), dstate]

    def __getattr__(self, name: str) -> Any:
        """`graph_shapes`, `to_graph` and `from_graph` are the kernel's."""
        return getattr(self.kernel, name)


def head_size(op: str, shape: Sequence[int]) -> int:
    """What a kernel of `op` must be compiled for to take tensors of this shape; 0 where there are no heads."""
    return shape[-1] if op in RECURRENCES and len(shape) == 4 else 0


def unusual_size(op: str, shape: Sequence[int]) -> str | None:
    """Why compiled kernels cannot take a head size."""
    size = head_size(op, shape)
    return f"head size {size} is not one of {HEAD_SIZES}" if size and size not in HEAD_SIZES else None


@functools.cache
def build_failure(backend: Backend, op: str, device: torch.device, size: int) -> str | None:
    """Why a compiled kernel cannot be had, warned about once; None if it can."""
    try:
        backend.kernel(op, device, size)
    except BuildError as error:
        logger.warning("%s runs as plain PyTorch, which is much slower: %s", op, error)
        return str(error)
    return None
