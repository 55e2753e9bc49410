"""The backend of plain PyTorch: every operation, anywhere, slowly. It has no kernels: each op runs its plain form."""

import torch

from rwkv_rlhf.ops import backend


class Backend(backend.Backend):
    """Refuses nothing."""

    ops = backend.OPERATIONS

    def preference(self, device: torch.device, dtype: torch.dtype) -> int:
        return 0

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        return None
