"""The recurrences of the pretend GPU: the C functions for CPUs, on the host memory of its tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_rlhf.ops import calls, cpu, gpu
from tests.support.pretend_gpu.tensors import PretendTensor


class Kernel(cpu.Kernel):
    """As `gpu.Kernel`, which nothing waits for."""

    def _run(
        self, name: str, given: list[Tensor], filled: Sequence[Tensor | None], sizes: Sequence[int], dtype: int
    ) -> str | None:
        tensors = [*given, *filled]
        assert all(x is None or isinstance(x, PretendTensor) for x in tensors), [type(x) for x in tensors]
        hosts = [None if x is None else x.host for x in tensors]
        assert all(x is None or x.is_contiguous() for x in hosts)
        return calls.call(getattr(self.functions, name), hosts, sizes, dtype, torch.get_num_threads())


def install() -> None:
    """Give them to the backend of GPUs, for the rest of the process."""

    def kernel(op: str, device: torch.device, head_size: int = 0) -> Kernel:
        return Kernel(op, cpu.library(op, head_size))

    gpu.kernel = kernel
