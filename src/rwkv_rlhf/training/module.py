"""The LightningModule: a batch becomes scores, scores become one number, every optimizer step becomes one record."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.data.batch import Batch, PairBatch, RatedBatch, TextBatch
from rwkv_rlhf.data.policy_batch import PromptBatch
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.host_memory import resident_bytes
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.kinds import LossValue
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.plan import Plan
from rwkv_rlhf.rl.loop import Rollouts
from rwkv_rlhf.scoring.divergence import mismatch_ratio
from rwkv_rlhf.scoring.evaluation import evaluating
from rwkv_rlhf.scoring.finite import broken_tensor
from rwkv_rlhf.scoring.forward import batch_loss
from rwkv_rlhf.scoring.teacher import Teacher
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.exit_status import Failure
from rwkv_rlhf.training.length import tokens_run
from rwkv_rlhf.training.loss_scale import LossScale
from rwkv_rlhf.training.optimizers import make_optimizer, parameter_groups
from rwkv_rlhf.training.schedule import Schedule
from rwkv_rlhf.training.step_figures import StepFigures
from rwkv_rlhf.training.strategies import (
    clips_itself,
    finish_gradients,
    gradient_norm,
    gradient_numbers,
    leaves_out_itself,
    norm_of_last_step,
)

log = logging.getLogger(__name__)

PREFERENCE_MEMORY = 0.9  # pref_percentage = 0.9 old + 0.1 new, from 0.5, as the tradition logs it

GIB = 1 << 30
COUNTERS = ("bad_steps", "pref_percentage", "last_record")


class NonFiniteLoss(Failure):
    """The loss or the gradient is no longer a number."""


def memory_held(device: torch.device) -> float:
    """GiB of the GPU at the highest so far, or of the process on a CPU; 0 where nobody knows."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()
    return round(held / GIB, 3)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name, those of the text beside pairs as `general.<name>`."""
    found: dict[str, Tensor] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, TextBatch):
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors_of(value).items()}
    return found


def mixed(preference: LossValue, text: LossValue, rho: float) -> LossValue:
    """rho * the loss of general text + (1 - rho) * that of the pairs beside it; L2Wrap is mixed as the loss is."""
    metrics = dict(preference.metrics) | {"general_nll": text.metrics["nll"]}
    metrics["loss"] = rho * text.metrics["loss"] + (1 - rho) * preference.metrics["loss"]
    if "l2wrap" in text.metrics:
        metrics["l2wrap"] = rho * text.metrics["l2wrap"] + (1 - rho) * preference.metrics.get("l2wrap", 0.0)
    return LossValue(rho * text.value + (1 - rho) * preference.value, metrics)


class TrainingModule(pl.LightningModule):
    """Trains `model` with the loss that `config` names.

    A batch carries `total`, the trained tokens (or pairs) of its whole optimizer step over micro-batches and ranks; the
    loss of a micro-batch is its sum divided by that total, so accumulation and ranks never change the mean. A `teacher`
    that runs along is asked about each batch first; `rollouts` puts sampled answers in the place of prompts.
    """

    def __init__(
        self,
        model: RWKV,
        plan: Plan,
        config: Config,
        schedule: Schedule,
        folder: Path,
        teacher: Teacher | None = None,
        rollouts: Rollouts | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.config = config
        self.schedule = schedule
        self.folder = folder
        self.teacher = teacher  # no torch module, so nothing of it is trained or saved
        self.rollouts = rollouts  # as the teacher
        self.bad_steps = 0
        self._bad = False  # something in the running optimizer step was not a number
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.loss = LOSSES[config.loss or tables.PRETRAINING]
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # called with the record of each optimizer step
        self.after_step: list[Callable[[], None]] = []  # called when an optimizer step is over, skipped or not
        self.last_record: dict[str, Any] = {}
        self.pref_percentage = 0.5
        self._figures = StepFigures()
        self._sums: dict[str, float] | None = None  # of the running optimizer step, once they are read
        self._kl: Tensor | None = None  # KTO's divergence of the running optimizer step
        self._step = 0  # the running optimizer step
        self._batches: dict[int, Batch] = {}  # of it, where only its end tells whether one was bad
        self._tokens = 0
        self._clock = time.perf_counter()
        self.grad_norm = 0.0

    @property
    def good_steps(self) -> int:
        """Optimizer steps that were made, those of before a resume too; not those that were left out."""
        return max(0, int(self.trainer.global_step) - self.bad_steps)

    @property
    def together(self) -> bool:
        """Whether every backward pass has to be gone through, because other ranks or DeepSpeed wait for it."""
        return not isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def training_step(self, batch: Batch | PromptBatch, index: int) -> Tensor | None:
        """One micro-batch -> its share of the optimizer step's loss.

        When that is not a number, one process on a CPU returns None. Several go on with it, so that all see it in the
        gradient, and so does a GPU, which is not asked before the step's end. The step is left out in every case.
        """
        heartbeat(f"forward pass of micro-batch {index} before optimizer step {self.trainer.global_step}")
        if isinstance(batch, PromptBatch):
            assert self.rollouts is not None
            batch = self.rollouts(batch).to(self.device)
        if self.teacher is not None and isinstance(batch, TextBatch):
            batch = self.teacher(batch)
        if isinstance(batch, RatedBatch):
            batch = self._with_kl(batch)
        share = batch_loss(self.model, batch, self.loss, self.config).per(batch.total)
        if isinstance(batch, PairBatch) and batch.general is not None:
            text = batch_loss(self.model, batch.general, LOSSES[tables.PRETRAINING], self.config)
            share = mixed(share, text.per(batch.general.total), self.config.dpo_general_corpus_ratio)
        value = share.value
        self._step = self.trainer.global_step
        self._tokens += tokens_run(batch)
        self._figures.add(share.metrics)
        if value.is_cuda:
            self._figures.losses.append(value.detach())
            self._batches[index] = batch
            value = value * torch.where(torch.isfinite(value.detach()), 1.0, math.nan)
        elif not torch.isfinite(value):
            self._skip(f"the loss is {float(value.detach())}", batch, index)
            if not self.together:
                return None
            value = value * math.nan  # in every gradient, so that all ranks see it
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        return value * (self.trainer.world_size * self.trainer.accumulate_grad_batches * scale)

    def _with_kl(self, batch: RatedBatch) -> RatedBatch:
        """With KTO's divergence of the running optimizer step, estimated over all ranks at its first micro-batch."""
        if batch.others:
            c = self.config
            with evaluating(self.model):
                ratio = mismatch_ratio(self.model, batch.others, head_chunk=c.head_chunk, chunk=c.chunk)
            self._kl = self.trainer.strategy.reduce(ratio, reduce_op="mean").clamp_min(0)
        return batch.having(kl=self._kl)

    def _skip(self, what: str, batch: Batch | None = None, index: int = 0) -> None:
        """Leave this optimizer step out, and keep the batch for replay; raises NonFiniteLoss after --max_bad_steps."""
        step = self._step
        if not self._bad and step <= self.bad_steps:  # none before it was good
            self._refuse_broken_start(what)
        if not self._bad:  # further micro-batches belong to the same step
            self.bad_steps += 1
        self._bad = True
        rows = ""
        if batch is not None:
            whose = f"-rank-{ranks.rank()}" if self.together else ""
            path = self.folder / f"bad-step-{step}-{index}{whose}.pth"
            write_tensors(tensors_of(batch), path)
            rows = f", its rows are in {path}"
        sentence = f"{what} at optimizer step {step}{rows}"
        if self.bad_steps > self.config.max_bad_steps:
            raise NonFiniteLoss(f"{sentence}: more than --max_bad_steps {self.config.max_bad_steps}; {self._advice()}")
        log.warning("%s: the step is skipped", sentence)

    def _refuse_broken_start(self, what: str) -> None:
        """Raises ValueError when a model that nothing has trained yet holds NaN or infinity."""
        models = {"load_model": self.model} | ({"teacher_model": self.teacher.model} if self.teacher else {})
        for flag, model in models.items():
            if name := broken_tensor(model):
                path = getattr(self.config, flag)
                raise ValueError(f"{what} before anything was trained: {name} of {{{flag}}} {path} holds nan or inf")

    def _advice(self) -> str:
        if self._step >= self.bad_steps:  # this one is counted among the bad
            return "lower --lr_init or use --precision fp32. The checkpoints written so far are intact"
        return "no step was good, so it is not the rate: use --precision fp32, or look for odd rows in the data"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that --optim names, over the profile's groups."""
        groups = parameter_groups(self.model, self.plan, self.model.sizes.version, bool(self.config.layerwise_lr))
        return make_optimizer(self.config, groups)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the global norm at --grad_clip (0 = never), touching the gradients only when they are longer.

        A step that is not a number is left out: by an optimizer on a GPU that can do so itself, else here.
        """
        if clips_itself(self.trainer):
            return
        most = self.config.grad_clip
        if self.config.train_tables:
            finish_gradients(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale_(gradient_numbers(optimizer))
        norm = self._figures.norm = gradient_norm(self.trainer, optimizer)
        if self.loss_scale is None and leaves_out_itself(optimizer, norm):
            self._figures.send()  # they are read when the update is queued
            if most > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)  # multiplies shorter ones by 1
            setattr(optimizer, "found_inf", (~torch.isfinite(norm)).to(torch.float32))  # noqa: B010  # torch's name
            return
        self._read_figures()  # a scale of the loss is the host's to choose
        if self._bad:
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left alone by the step
            return
        if self.loss_scale is not None:
            self.loss_scale.took_step()
        if 0 < most < self.grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)

    def _read_figures(self) -> dict[str, float]:
        """The sums of the step's metrics. When they are first read, a step that is not a number is found out."""
        if self._sums is None:
            self._sums, losses, norm = self._figures.read()
            for (index, batch), loss in zip(self._batches.items(), losses, strict=True):
                if not math.isfinite(loss):
                    self._skip(f"the loss is {loss}", batch, index)
            if norm is not None:
                self.grad_norm = norm
                if not math.isfinite(norm):
                    self._not_a_number(norm)
        return self._sums

    def _not_a_number(self, norm: float) -> None:
        """The norm of the gradient, which all ranks know, says that the step must be left out. In half precision a
        smaller scale may help; raises NonFiniteLoss when none is left."""
        if self.loss_scale is None:
            if not self._bad:
                self._skip(f"the gradient's norm is {norm}")
            return
        self._bad = True
        helps = self.loss_scale.overflowed()
        step, scale = self.trainer.global_step, self.loss_scale.scale
        if not helps:
            raise NonFiniteLoss(
                f"the gradient overflows at optimizer step {step} even with the loss scaled by {scale:.1e}: use "
                "--precision bf16 or fp32, or lower --lr_init. The checkpoints written so far are intact"
            )
        log.info("the gradient overflows at optimizer step %d: the step is left out, the loss scale is %g", step, scale)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every group the rate and the decay of this very step."""
        step, final = self.trainer.global_step, self.config.weight_decay_final
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(step, group["lr_init"], group["lr_final"])
            group["weight_decay"] = self.schedule.decay(step, group["decay_init"], final)

    def on_train_epoch_start(self) -> None:
        """The clock of a mini-epoch's first step starts when validation and saves are over."""
        self._clock = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """Close the record of an optimizer step when its last micro-batch is done."""
        if (index + 1) % self.trainer.accumulate_grad_batches:
            return
        self._close_record()
        if self.rollouts is not None:
            self.rollouts.step_done(self.last_record)
        for call in self.after_step:
            call()

    def _close_record(self) -> None:
        now = time.perf_counter()
        if clips_itself(self.trainer):
            self.grad_norm = norm_of_last_step(self.trainer)
            if not self._bad and not math.isfinite(self.grad_norm):
                self._skip(f"the gradient's norm is {self.grad_norm}")
        found = self._read_figures()
        self._figures, self._sums, self._batches = StepFigures(), None, {}
        if self._bad:
            self._bad = False
            self._tokens, self._clock = 0, now
            return
        names = sorted(found)
        tokens, *sums = ranks.all_reduce_sum([self._tokens, *(found[name] for name in names)])
        means = dict(zip(names, sums))
        groups = self.trainer.optimizers[0].param_groups
        widest = max(groups, key=lambda group: sum(p.numel() for p in group["params"]))
        record = {"step": self.trainer.global_step, "loss": means.pop("loss"), "lr": widest["lr"]}
        record |= {"tokens": int(tokens), "tokens_per_s": tokens / max(now - self._clock, 1e-9)}
        record |= {"grad_norm": self.grad_norm}
        if held := memory_held(self.device):
            record["memory"] = held
        if self.loss_scale is not None:
            record |= {"loss_scale": self.loss_scale.scale, "overflows": self.loss_scale.overflows}
        if "accuracy" in means:
            self.pref_percentage = PREFERENCE_MEMORY * self.pref_percentage + 0.1 * means["accuracy"]
            record["pref_percentage"] = self.pref_percentage
        if self.rollouts is not None:
            record |= self.rollouts.figures
            training = now - self._clock - self.rollouts.take_seconds()
            record["trained_tokens_per_s"] = tokens / max(training, 1e-9)
        self.last_record = record | means
        for listener in self.listeners:
            listener(self.last_record)
        self._tokens, self._clock = 0, now

    def counters(self) -> dict[str, Any]:
        """What a resumed run must know of the steps before it."""
        found = {name: getattr(self, name) for name in COUNTERS}
        if self.rollouts is not None:
            found["rollouts"] = self.rollouts.state()
        return found if self.loss_scale is None else found | {"loss_scale": self.loss_scale.state_dict()}

    def take_counters(self, counters: dict[str, Any]) -> None:
        """Go on counting where `counters` was called."""
        for name in COUNTERS:
            setattr(self, name, counters[name])
        if self.rollouts is not None:
            self.rollouts.take_state(counters["rollouts"])
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(counters["loss_scale"])
