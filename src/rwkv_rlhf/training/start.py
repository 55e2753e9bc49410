"""From a Config to a model that is ready to train: the base file, its sizes, the plan, the adapters."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import (
    AdapterFlags,
    check_base,
    chosen_quant,
    cold_of,
    factors_of,
    hinting,
    layout_of,
    needs_initial_factors,
)
from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model, file_sizes, load_adapter
from rwkv_rlhf.checkpoints.merging import base_reader, shapes
from rwkv_rlhf.checkpoints.named_model import NamedModel, named_model
from rwkv_rlhf.checkpoints.partial import completed
from rwkv_rlhf.checkpoints.resume_points import ResumePoint
from rwkv_rlhf.checkpoints.run_folder import INITIAL, NUMBERED, newest_checkpoint
from rwkv_rlhf.checkpoints.sidecar import Sidecar, check_whole, read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, tensors_hash, write_tensors
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.host_memory import keep_pages, return_pages
from rwkv_rlhf.layers.placing import Layout, Report
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import Sizes, check_flags
from rwkv_rlhf.ops import compiling
from rwkv_rlhf.ops.product_table import ways_for
from rwkv_rlhf.ops.product_ways import PLAIN, Ways, matters, refusal
from rwkv_rlhf.plan import Plan, plan_for
from rwkv_rlhf.precision import DTYPES, device_for
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import RWKV_LM, Config
from rwkv_rlhf.settings.constraints import trains
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.implementations import with_fact
from rwkv_rlhf.training.optimizers import NOTHING, check_optimizer

log = logging.getLogger(__name__)

HINTS = {
    "base": "give the right {load_model}, or {force} 1 to continue all the same",
    "factors": "give them with {load_adapter_pissa_init}",
    "cold": "{load_cold_adapter} must name the adapter that was merged into its base, or be left out",
}
SHAPE = re.compile(r"L(\d{1,9})-D(\d{1,9})(?::V(\d{1,30}))?")
SIZE_FLAGS = ("version", "n_layer", "n_embd", "vocab_size", "head_size", "dim_att", "dim_ffn")


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
    path = folder / INITIAL
    write_tensors(tensors, path)
    count = sum(tensor.numel() for tensor in tensors.values())
    log.info(
        "%s: %s, %d layers, width %d, %s",
        path,
        config.version,
        config.n_layer,
        config.n_embd,
        counted(count, "parameter"),
    )
    return path


@dataclass
class Start:
    """A loaded model and what is known of the file it came from."""

    path: Path
    sizes: Sizes
    plan: Plan
    model: RWKV
    report: Report
    read: Callable[[], Mapping[str, Tensor]]  # opens the base file anew, with the cold adapter merged
    cold: Path | None = None

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 of the base file, read by the first of several ranks."""
        return ranks.broadcast_from_zero(lambda: file_hash(self.path))

    @cached_property
    def cold_hash(self) -> str:
        """SHA-256 of the adapter that was merged into the base before anything else, "" without one."""
        return ranks.broadcast_from_zero(lambda: file_hash(self.cold) if self.cold else "")

    @cached_property
    def hash(self) -> str:
        """What tells this start model from another: the base file's SHA-256, with that of the cold adapter."""
        return self.base_hash + (f"+{self.cold_hash}" if self.cold else "")


def continues(config: Config) -> bool:
    """Whether the run goes on from the newest checkpoint of its own folder (--load_model 0)."""
    return config.load_model in ("", "0")


def numbered_from(config: Config, path: Path) -> Config:
    """With --train_stage 3 a run that goes on from rwkv-<n> is numbered, scheduled and fed from n + 1 on.

    Later, if --epoch_begin says so; never earlier, as in RWKV-LM, whose commands type --epoch_begin 0. With its
    schedule such a run also warms up for ten steps, unless --warmup_steps says otherwise.
    """
    found = NUMBERED.match(path.name)
    begin = int(found[1]) + 1 if found else 0
    if not (continues(config) and found) or config.epoch_begin >= begin:
        return config
    log.info("continuing from %s: --epoch_begin %d", path, begin)
    again = config.lr_schedule == RWKV_LM and config.warmup_steps < 0  # the moments begin anew
    return dataclasses.replace(config, epoch_begin=begin, warmup_steps=10 if again else config.warmup_steps)


def with_named_model(config: Config) -> Config:
    """A run whose --load_model is the folder of another run begins from that one's end: its base, and what it trained
    merged into it. Raises ValueError, on every rank alike, when a file is not there."""
    if not config.load_model or not Path(config.load_model).is_dir():
        return config

    def look() -> NamedModel | str:
        try:
            return named_model(config.load_model)
        except ValueError as mistake:
            return f"{{load_model}} {mistake}"

    named = ranks.broadcast_from_zero(look)
    if isinstance(named, str):
        raise ValueError(named)
    if named.adapter is None:
        return dataclasses.replace(config, load_model=str(named.base))
    if config.load_cold_adapter:
        raise ValueError(
            f"{{load_model}} {config.load_model} is the folder of a run, which is merged as {{load_cold_adapter}}: "
            "give one of the two"
        )
    log.info("%s: %s over %s", config.load_model, named.adapter.name, named.base)
    return dataclasses.replace(config, load_model=str(named.base), load_cold_adapter=str(named.adapter))


def base_path(config: Config, folder: Path, point: ResumePoint | None = None) -> Path:
    """The checkpoint to start from: --load_model, or the newest in the project folder with --load_model 0.

    A run that is resumed has the file that it began from, not what it saved since.
    """
    if not continues(config):
        return Path(config.load_model)
    return newest_checkpoint(folder) if point is None else point.project / point.about["base"]


def start(config: Config, folder: Path, point: ResumePoint | None = None) -> Start:
    """Load the base model and let every matrix become what its profile row says. Raises ValueError for bad files.

    With `point` PiSSA has the initial factors of the run that is resumed.
    """
    if trains(config):
        check_optimizer(config)
        check_compile(config)
    return_pages()
    path = base_path(config, folder, point)
    sizes = file_sizes(path)
    check_flags(sizes, **{name: getattr(config, name) for name in SIZE_FLAGS if name in config.given})
    plan = plan_for(config, sizes.n_layer)
    check_tables(config, plan, sizes, path)
    if continues(config) and plan.modes != {"full"}:
        raise ValueError(
            "--load_model 0 continues from whole models in the project folder, but this plan saves only parts of one: "
            "give the model with --load_model"
        )
    with hinting(HINTS):
        cold = cold_adapter(config)
        layout = adapter_layout(config)
        initial = resumed_factors(config, plan, layout) if point is None else factors_again(point)
        initial_file = "" if config.load_adapter else config.load_adapter_pissa_init
        read = base_reader(path, cold, device_for(config.accelerator), initial_file, force=config.force)
    if config.load_partial:
        read = whole_reader(config, plan, read, sizes, path)
    model, report = build_model(
        shapes(read()),
        BuildOptions(
            DTYPES[config.precision],
            layout=layout,
            plan=plan,
            quant=config.storage,
            limited=config.limited_lora,
            rslora=config.rslora,
            svd_niter=config.svd_niter,
            initial=initial,
            seed=config.seed,
            device=device_for(config.accelerator),
            grad_cp=config.grad_cp,
            wkv_backend=config.wkv_backend,
            dropout=config.dropout,
            ways=product_ways(config, sizes.n_embd, point),
        ),
        source=path,
        reopen=read,
    )
    if device_for(config.accelerator) == "cpu":
        keep_pages()
    if trains(config) and not report.trained:
        raise ValueError(NOTHING)
    begun = Start(path, sizes, plan, model, report, read, cold)
    if config.load_adapter:
        check_adapter(config, begun)
    return begun


def product_ways(config: Config, width: int, point: ResumePoint | None) -> Ways:
    """How a CPU multiplies: as --products says, as the run did that goes on from `point`, or by rank zero's table."""
    dtype = DTYPES[config.precision]
    if device_for(config.accelerator) != "cpu" or not matters(dtype, width):
        return PLAIN
    if config.products != "auto":
        why = refusal(config.products, dtype)
        if why:
            raise ValueError(f"{{products}} {config.products}: {why}; leave it auto")
        return Ways.all(config.products)
    if point is None:
        return ranks.broadcast_from_zero(lambda: ways_for(dtype, width))
    known = Ways.read(point.about.get("products", {}))
    found = known.possible(dtype)
    if found != known:
        log.warning("this PyTorch multiplies otherwise than that of %s: the rest will not be the same bits", point.path)
    return found


def check_compile(config: Config) -> None:
    """Raises ValueError when --compile 1 finds no compiler here."""
    why = compiling.refusal(torch.device(device_for(config.accelerator))) if config.compile else None
    if why:
        raise ValueError(f"{{compile}} 1: {why}, or leave it 0")


def check_tables(config: Config, plan: Plan, sizes: Sizes, path: Path) -> None:
    """Raises ValueError when --train_tables 1 finds no table by token in the file, or no row that trains one."""
    if not (config.train_tables and trains(config)):
        return
    by_token = tables.VERSIONS[sizes.version].token_tables
    if not by_token:
        known = ", ".join(with_fact(tables.VERSIONS, lambda facts: bool(facts.token_tables)))
        raise ValueError(f"{{train_tables}} 1: {path} is an {sizes.version} model, and only {known} has such tables")
    names = [f"blocks.{layer}.{table}" for layer in range(sizes.n_layer) for table in by_token]
    if not any(plan.trains(name, sizes.version, config.limited_lora) for name in names):
        raise ValueError(
            "{train_tables} 1: no block's tables would train; give {peft} full or an adapter with ffn among its "
            "{lora_parts}, or a {layer_profile} with rows that are not freeze"
        )


def whole_reader(
    config: Config, plan: Plan, read: Callable[[], Mapping[str, Tensor]], sizes: Sizes, path: Path
) -> Callable[[], Mapping[str, Tensor]]:
    """--load_partial 1: `read` with initial values for what the file lacks. Raises ValueError where adapters train."""
    if plan.modes != {"full"} or config.load_cold_adapter:
        raise ValueError(
            "--load_partial 1 is for whole models: what the file lacks would be in no checkpoint of an adapter. Train "
            "all of it first, without --layer_profile, --peft and --load_cold_adapter"
        )
    return completed(read, sizes, path, config.seed)


def shape_model(config: Config) -> tuple[RWKV, Report]:
    """The model that --dry_run_shape describes, by the plan of the flags, on the meta device: sizes without numbers.

    Raises ValueError for a shape that is not written like L61-D4096 or L61-D4096:V65536, or that cannot be.
    """
    found = SHAPE.fullmatch(config.dry_run_shape)
    if not found or not all(int(number) for number in found.groups("1")):
        raise ValueError(
            f"{{dry_run_shape}} {config.dry_run_shape}: expected layers and width like L61-D4096, or L61-D4096:V65536 "
            "with the vocabulary"
        )
    layers, width, vocabulary = (int(number) for number in found.groups(str(config.vocab_size or 65536)))
    if layers > 1000 or max(width, config.dim_ffn, config.head_size) > 1 << 20 or vocabulary > 1 << 24:
        raise ValueError(
            f"{{dry_run_shape}} {config.dry_run_shape}: at most 1,000 layers, sizes of {1 << 20:,} and a vocabulary of "
            f"{1 << 24:,}"
        )
    version = config.version or "x070"
    with torch.device("meta"):
        tensors = initial_tensors(version, layers, width, vocabulary, config.head_size, dim_ffn=config.dim_ffn or None)
    return build_model(
        tensors,
        BuildOptions(
            DTYPES[config.precision],
            plan=plan_for(config, layers),
            quant=config.storage,
            limited=config.limited_lora,
            rslora=config.rslora,
            device="meta",
            dropout=config.dropout,
        ),
        source="the shape",
    )


def cold_adapter(config: Config) -> Path | None:
    """--load_cold_adapter, or what lay below --load_adapter in its training. Raises ValueError when they differ."""
    if not config.load_adapter:
        return Path(config.load_cold_adapter) if config.load_cold_adapter else None
    sidecar = read_sidecar(config.load_adapter)
    return cold_of(config.load_adapter, sidecar, config.load_cold_adapter, force=config.force)


def resumed_factors(config: Config, plan: Plan, layout: Layout | None) -> dict[str, Tensor] | None:
    """PiSSA's initial factors of --load_adapter: made anew they would be another base. None when there is no need."""
    modes = plan.modes if layout is None else layout.modes
    sidecar = read_sidecar(config.load_adapter) if config.load_adapter else None
    other = sidecar is not None and not needs_initial_factors({how.mode for how in sidecar.adapted.values()})
    if not (config.load_adapter and needs_initial_factors(modes)) or other:  # another kind is refused when it is loaded
        if config.load_adapter and config.load_adapter_pissa_init:
            raise ValueError(f"{{load_adapter_pissa_init}} {config.load_adapter_pissa_init}: no layer has mode pissa")
        return None
    return factors_of(config.load_adapter, sidecar, config.load_adapter_pissa_init, force=config.force)


def factors_again(point: ResumePoint) -> dict[str, Tensor] | None:
    """PiSSA's initial factors of the run that wrote `point`; None without any. Raises ValueError when they are gone."""
    name, sha256 = point.about["initial"]
    if not name:
        return None
    factors = read_tensors(point.project / name)
    if tensors_hash(factors) != sha256:
        raise ValueError(f"{point.project / name} holds other initial factors than those that {point.path} began with")
    return factors


def adapter_layout(config: Config) -> Layout | None:
    """For --eval_only without a plan: what --load_adapter itself says was trained; else None (the plan rules)."""
    planned = {"layer_profile", "peft"} & config.given
    if not (config.eval_only and config.load_adapter) or planned:
        return None
    sidecar = read_sidecar(config.load_adapter)
    if sidecar is None:
        raise ValueError(
            f"--load_adapter {config.load_adapter} has no .json beside it, so say how it was trained: "
            "--layer_profile, or --peft lora --lora_r R --lora_alpha A, and --quant"
        )
    quant = chosen_quant(sidecar, config.storage if {"quant", "quant_mode"} & config.given else None)
    return layout_of(read_tensors(config.load_adapter), sidecar, AdapterFlags(quant=quant))


def check_adapter(config: Config, start: Start) -> None:
    """Refuse --load_adapter of another base or plan, before references are computed. Raises ValueError."""
    sidecar = read_sidecar(config.load_adapter)
    check_whole(sidecar, config.load_adapter)
    with hinting(HINTS):
        check_base(sidecar, start.path, sha256=start.base_hash, force=config.force)
    if sidecar is not None:
        check_same_adapters(sidecar, start.report.layout, config.load_adapter)


def resume_adapter(config: Config, start: Start) -> None:
    """Put --load_adapter into the model, after the reference was taken. Raises ValueError when it does not fit."""
    load_adapter(start.model, config.load_adapter)


def check_same_adapters(sidecar: Sidecar, layout: Layout, path: str) -> None:
    """Refuse to go on with another scaling or storage than the checkpoint was trained with; raises ValueError."""
    if sidecar.quant_mode != layout.store:
        raise ValueError(
            f"{path} was trained on {sidecar.quant_mode} matrices, this run would hold them as {layout.store}: "
            "give the same --quant and --quant_mode"
        )
    for name, how in layout.adapted.items():
        was = sidecar.adapted.get(name)
        if was is not None and (was.mode, was.rank, was.scaling) != (how.mode, how.rank, how.scaling):
            raise ValueError(
                f"{path} was trained with {was.mode} of rank {was.rank} and scaling {was.scaling:g} in {name}, "
                f"this run would use {how.mode} of rank {how.rank} and scaling {how.scaling:g}"
            )
