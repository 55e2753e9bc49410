"""DeepSpeed's ZeRO (arXiv 1910.02054) through Lightning, also on a CPU, which Lightning's own strategy refuses.

Every rank keeps a share of the optimizer's state (stage 1), of the gradients too (stage 2), of the parameters too
(stage 3). What trains is float32, as everywhere here; what is frozen stays as it is.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist

from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import STATES
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config


class AsItIs(DeepSpeedPrecision):
    """Leaves model and batches alone: a cast to float32 would undo the frozen tensors' dtype."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def convert_input(self, data: Any) -> Any:
        """The batch itself."""
        return data

    def backward(self, tensor: Tensor, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # as Lightning's own
        """As Lightning's, but the loss is divided by the number of micro-batches once only: Lightning has done it."""
        engine: Any = model.trainer.model
        engine.backward(tensor, scale_wrt_gas=False)


class Zero(DeepSpeedStrategy):
    """Lightning's strategy without its demand for a GPU."""

    def setup_environment(self) -> None:
        """As of any parallel strategy; DeepSpeed's own asks for CUDA."""
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """The processes have met already; one alone meets itself."""
        self.set_world_ranks()
        on_gpu = self.root_device.type == "cuda"
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
            )
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of compiling, for inference only
        self._set_node_environment_variables()
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        if self.zero_stage_3:
            keep_whole(model.model, wrapped)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(partial(_lend_shape, parameter))
        return engine, wrapped

    @property
    def gradient_norm(self) -> float:
        """The norm of the gradient that the last step was made of, before it was clipped; nan when it left the step
        out because that was not a number."""
        optimizer: Any = self.optimizers[0]  # DeepSpeed's
        if optimizer.overflow:
            return float("nan")
        return float(self.deepspeed_engine.get_global_grad_norm())


def keep_whole(model: Any, optimizer: Any) -> None:
    """Let every rank hold all of the head and of the learnt states between steps (stage 3).

    States are read by the block, not by the half that owns them. The head runs in chunks, on each rank as many as it
    has trained tokens: gathering it for each of them would never end, so DeepSpeed's hooks are taken off it.
    """
    states = [p for name, p in model.named_parameters() if name.endswith(STATES)]
    parameters = [*model.head.parameters(), *states]
    for parameter in parameters:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            optimizer.persistent_parameters.append(parameter)
    whole = optimizer.persistent_parameters  # vectors too, as after each step: held-out examples run before the first
    if whole:
        whole[0].all_gather(whole)
    for part in model.head.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()


def _lend_shape(parameter: Tensor, gradient: Tensor) -> None:
    """Give a parameter that was let go the shape of its gradient, without memory, when autograd is about to store it.

    A block that ran twice (prompts, answers) and is recomputed gets the sum of both gradients after DeepSpeed has let
    its parameters go, and autograd copies a gradient into the shape of the parameter.
    """
    if parameter.shape != gradient.shape:
        parameter.data = gradient.new_empty(1).expand(gradient.shape)


def zero(config: Config, model: RWKV) -> Zero:
    """The strategy that --strategy deepspeed_stage_... names. Raises ValueError when deepspeed is not installed."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--strategy {config.strategy} needs the package deepspeed: pip install deepspeed") from error
    facts = tables.STRATEGIES[config.strategy]
    elements = config.ds_bucket_mb * 1_000_000
    settings: dict[str, Any] = {
        "stage": facts.stage,
        "memory_efficient_linear": False,  # it would replace torch's own for the whole process
        "stage3_param_persistence_threshold": 2 * model.sizes.n_embd,  # vectors are not worth a message
        "contiguous_gradients": True,
        # each share is sent to its owner alone: by default a bucket is added up on every rank, half as much again
        "use_multi_rank_bucket_allreduce": False,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
    }
    if facts.offload:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if facts.stage == 3:
            settings["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return Zero(
        config={
            "zero_optimization": settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too, and needs no compiler
            "gradient_clipping": config.grad_clip,
            "train_micro_batch_size_per_gpu": config.micro_bsz,
            "steps_per_print": 1 << 62,
        },
        precision_plugin=AsItIs(),
        timeout=timedelta(minutes=config.timeout),
    )
