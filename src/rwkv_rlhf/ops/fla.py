"""The backend of the flash-linear-attention library (fla-org), where it is installed: its chunked RWKV-6 and RWKV-7.

Its operators bring their own gradients. They differ from ours in their arguments: the decay comes as a logarithm, r is
multiplied by a scale unless that is 1, and a state is (key, value) instead of (value, key).

B batch, T tokens, H heads, N head size, S segments
"""

import functools
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.ops import backend
from rwkv_rlhf.ops.wkv7 import DECAY_RATE

PACKAGE, OLDEST = "flash-linear-attention", (0, 6)
OPERATORS = {"wkv6": "fla.ops.rwkv6:chunk_rwkv6", "wkv7": "fla.ops.rwkv7:chunk_rwkv7"}


class Backend(backend.Backend):
    """RWKV-6 and RWKV-7 on a GPU, where it is asked for by name."""

    ops = tuple(OPERATORS)
    own_gradient = True

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if missing := _missing():
            return missing
        if device.type != "cuda":
            return f"the tensors are on {device}, and {PACKAGE} runs on GPUs"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"no operator for {dtype}: its RWKV-7 takes 16-bit numbers"
        return backend.unusual_size(op, shape)

    def kernel(self, op: str, device: torch.device, head_size: int) -> "Kernel":
        module, _, name = OPERATORS[op].partition(":")
        return Kernel(op, getattr(importlib.import_module(module), name))


@functools.cache
def _missing() -> str | None:
    """Why the library cannot be used on this machine at all."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed (pip install {PACKAGE})"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"{PACKAGE} {version} is too old; {'.'.join(map(str, OLDEST))} is the oldest that is known to work"
    return None


class Kernel:
    """One recurrence by the library's `operator`, differentiable."""

    def __init__(self, op: str, operator: Callable[..., Any]) -> None:
        self.op, self.operator = op, operator

    def __call__(self, inputs: Sequence[Tensor], state: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """y (B, T, H, N) and the final state (S, H, N_v, N_k), for inputs as ops/recurrence.py gives them to a kernel:
        per-token inputs, vectors, and where rows begin among the B T tokens."""
        named: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
        arguments = self._arguments(*inputs)
        filled = [row for row, (begin, end) in enumerate(itertools.pairwise(starts)) if begin < end]
        if not filled:
            return torch.zeros_like(inputs[0]), state
        whole = len(filled) == len(starts) - 1
        rows = state if whole else state[filled]  # an empty segment is no segment to the library
        if inputs[0].shape[0] == 1 and len(filled) > 1:
            edges = torch.tensor([*(starts[row] for row in filled), starts[-1]])
            named |= {"cu_seqlens": edges.to(state.device, non_blocking=True), "cu_seqlens_cpu": edges}
        y, last = self.operator(*arguments, initial_state=rows.transpose(-1, -2).contiguous(), **named)
        last = last.transpose(-1, -2)
        if not whole:
            last = state.index_copy(0, torch.tensor(filled, device=state.device), last.to(state.dtype))
        return y, last

    def _arguments(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs in the library's order, with logarithms of the decay in float32."""
        if self.op == "wkv6":
            r, k, v, w, u = inputs
            return r, k, v, -torch.exp(w.float()), u
        r, w, k, v, a, b = inputs
        return r, -DECAY_RATE * torch.sigmoid(w.float()), k, v, a, b
