"""DeepSpeed's AdamW for tensors in host memory, in C++ that is compiled at its first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def cpu_adam(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam with decoupled decay. Raises ValueError when it cannot be had or compiled."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise ValueError("{optim} cpu_adam needs the package deepspeed: pip install deepspeed") from error

    class Repeatable(DeepSpeedCPUAdam):
        """A step depends on its number alone: the library multiplies the powers of beta from step to step, which
        rounds otherwise than the power that a resumed run begins with."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
            self.ds_opt_adam.destroy_adam(self.opt_id)
            self.ds_opt_adam.create_adam(self.opt_id, 0.0, *betas, eps, 0.0, True, False)
            return super().step(closure)

    try:
        return Repeatable(list(groups), betas=betas, eps=eps, adamw_mode=True)
    except RuntimeError as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"{{optim}} cpu_adam cannot be compiled here ({why}): use {{optim}} adamw") from error
