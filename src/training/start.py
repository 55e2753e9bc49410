"""From a Config to a model that is ready to train: the base file, its sizes, the plan, the adapters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from src.config import Config
from src.files import file_hash
from src.layers.placing import Layout, Report
from src.model.checkpoint import file_sizes, load_adapter, load_model, read_tensors, write_atomic
from src.model.initial import initial_tensors
from src.model.rwkv import RWKV
from src.model.sizes import Sizes, check_flags
from src.plan import Plan, plan_for
from src.training.allocator import keep_pages
from src.training.folder import newest_checkpoint
from src.training.merging import check_base, chosen_quant, layout_of
from src.training.sidecar import read_sidecar
from src.unbuilt import refuse_unbuilt

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
SIZE_FLAGS = ("version", "n_layer", "n_embd", "vocab_size", "head_size", "dim_att", "dim_ffn")


def device_of(config: Config) -> str:
    """ "cuda" or "cpu". Raises ValueError when --accelerator gpu finds no GPU."""
    found = torch.cuda.is_available()
    if config.accelerator == "gpu" and not found:
        raise ValueError("--accelerator gpu: no GPU is visible here; use --accelerator auto or cpu")
    return "cuda" if found and config.accelerator != "cpu" else "cpu"


def write_initial(config: Config, folder: Path) -> Path:
    """--train_stage 1: `rwkv-init.pth`, float32, with the tradition's initial values."""
    if not config.version or not config.vocab_size:
        raise ValueError("--train_stage 1 needs --my_testing, --n_layer, --n_embd and --vocab_size")
    tensors = initial_tensors(
        config.version,
        config.n_layer,
        config.n_embd,
        config.vocab_size,
        config.head_size,
        config.seed,
        config.dim_ffn or None,
    )
    path = folder / "rwkv-init.pth"
    write_atomic(tensors, path)
    count = sum(tensor.numel() for tensor in tensors.values())
    log.info("%s: %s, %d layers, width %d, %d parameters", path, config.version, config.n_layer, config.n_embd, count)
    return path


@dataclass
class Start:
    """A loaded model and what is known of the file it came from."""

    path: Path
    sizes: Sizes
    plan: Plan
    model: RWKV
    report: Report

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the base file."""
        return file_hash(self.path)


def base_path(config: Config, folder: Path) -> Path:
    """The checkpoint to start from: --load_model, or the newest in the project folder with --load_model 0."""
    return newest_checkpoint(folder) if config.load_model in ("", "0") else Path(config.load_model)


def start(config: Config, folder: Path) -> Start:
    """Load the base model and let every matrix become what its profile row says. Raises ValueError for bad files."""
    if device_of(config) == "cpu":
        keep_pages()
    path = base_path(config, folder)
    sizes = file_sizes(path)
    check_flags(sizes, **{name: getattr(config, name) for name in SIZE_FLAGS if name in config.given})
    plan = plan_for(config, sizes.n_layer)
    refuse_unbuilt(config, plan.modes, sizes.version)
    model, report = load_model(
        path,
        compute_dtype=DTYPES[config.precision],
        layout=adapter_layout(config),
        plan=plan,
        quant=config.storage,
        limited=config.limited_lora,
        rslora=config.rslora,
        seed=config.seed,
        device=device_of(config),
        grad_cp=config.grad_cp,
        wkv_backend=config.wkv_backend,
    )
    return Start(path, sizes, plan, model, report)


def adapter_layout(config: Config) -> Layout | None:
    """For --eval_only without a plan: what --load_adapter itself says was trained; else None (the plan rules)."""
    planned = {"layer_profile", "peft"} & config.given
    if not (config.eval_only and config.load_adapter) or planned:
        return None
    sidecar = read_sidecar(config.load_adapter)
    alpha = config.lora_alpha if sidecar is None else None
    quant = chosen_quant(sidecar, config.storage if "quant_mode" in config.given else None)
    return layout_of(read_tensors(config.load_adapter), sidecar, alpha=alpha, quant=quant)


def resume_adapter(config: Config, start: Start) -> None:
    """Put --load_adapter into the model, after the reference was taken. Raises ValueError for another base or plan."""
    check_base(read_sidecar(config.load_adapter), start.path)
    load_adapter(start.model, config.load_adapter)
