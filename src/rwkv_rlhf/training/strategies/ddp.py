"""--strategy ddp: the whole model on each rank; gradients are added up while the backward pass goes on."""

from __future__ import annotations

from datetime import timedelta

from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import nn

from rwkv_rlhf.checkpoints.loading import checkpoint_tensors
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.settings.config import Config


def ddp(config: Config, model: nn.Module) -> Strategy | str:
    """The whole model on each rank. One process needs no strategy."""
    if not ranks.is_distributed():
        return "auto"
    ranks.broadcast_parameters(list(checkpoint_tensors(model).values()))
    return DDPStrategy(
        timeout=timedelta(minutes=config.timeout),
        init_sync=False,  # all ranks read the same file; what trains was sent above
        broadcast_buffers=False,  # packed matrices never change
        gradient_as_bucket_view=True,
    )
