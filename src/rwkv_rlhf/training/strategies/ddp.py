"""--strategy ddp: the whole model on each rank; gradients are added up while the backward pass goes on.

Those of tables by token have the rows of some tokens only, and NCCL takes no sparse tensors: DDP leaves them alone, and
they are put together before the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rwkv_rlhf.checkpoints.loading import checkpoint_tensors
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.plan import is_token_table
from rwkv_rlhf.settings.config import Config


class Replicated(DDPStrategy):
    """Lightning's strategy, whose DDP leaves tables by token alone."""

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        names = [name for name, _ in self.lightning_module.named_parameters() if is_token_table(name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.lightning_module, names)
        super().setup(trainer)


def average_rows(tables: Iterable[Tensor]) -> None:
    """Give each table (V, C) on every rank the mean of the ranks' sparse gradients, rows in the order of ranks."""
    for table in tables:
        rows, values = torch.empty(0, dtype=torch.int64, device=table.device), table.detach()[:0]
        if table.grad is not None:  # else nothing ran here, and others may have rows
            gradient = table.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
        rows = torch.cat(ranks.all_gather_rows(rows))
        values = torch.cat(ranks.all_gather_rows(values)) / ranks.world_size()
        whole = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False)
        table.grad = whole.coalesce() if len(rows) else None


def ddp(config: Config, model: nn.Module) -> Strategy | str:
    """The whole model on each rank. One process needs no strategy."""
    if not ranks.is_distributed():
        return "auto"
    ranks.broadcast_parameters(list(checkpoint_tensors(model).values()))
    return Replicated(
        timeout=timedelta(minutes=config.timeout),
        init_sync=False,  # all ranks read the same file; what trains was sent above
        broadcast_buffers=False,  # packed matrices never change
        gradient_as_bucket_view=True,
    )
