"""--strategy fsdp: what trains is split over the ranks block by block, by torch's `fully_shard` (FSDP2).

A block's parameters are put together before it runs, forward and backward, and split again after it; gradients and the
optimizer's state are split as the parameters are. Frozen tensors, packed or not, stay whole on each rank.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rwkv_rlhf.checkpoints.loading import checkpoint_tensors
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config


class Sharded(ModelParallelStrategy):
    """Lightning's strategy, of which every rank is a data-parallel one."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Split the model, then make the optimizer over the parts. Lightning's own wants the module to split itself."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        shard(self.lightning_module.model, self.device_mesh["data_parallel"])
        self.barrier()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Split the trained parameters of an RWKV over the ranks of `mesh`: each block by itself, and all the rest, which
    is whole from the first forward pass to the end of the backward pass."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(model, mesh=mesh, ignored_params=frozen, reshard_after_forward=False)


def fsdp(config: Config, model: nn.Module) -> Sharded | str:
    """The strategy of --strategy fsdp; one process has nobody to share with."""
    if not ranks.is_distributed():
        return "auto"
    heads = ("head", *tables.SCALAR_HEADS)
    if not any(p.requires_grad for name, p in model.named_parameters() if name.split(".")[0] not in heads):
        raise ValueError("{strategy} fsdp has no backward pass to split where only the head learns; use {strategy} ddp")
    ranks.broadcast_parameters(list(checkpoint_tensors(model).values()))
    return Sharded(
        data_parallel_size=ranks.world_size(), tensor_parallel_size=1, timeout=timedelta(minutes=config.timeout)
    )
