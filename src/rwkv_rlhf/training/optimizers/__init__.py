"""From --optim to an optimizer: the groups of the layer profile, which tensors it takes, and what it keeps of them.

Groups are one per (lr_init, lr_final, weight_decay), never one per tensor.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.plan import Plan, Rates, is_block_matrix, is_token_table
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.optimizers import ADAMW, OPTIMIZERS
from rwkv_rlhf.training.optimizers.lazy_adam import LazyAdam
from rwkv_rlhf.training.optimizers.stepping import Together

NOTHING = "the layer profile trains nothing: give at least one row a mode other than freeze, or --state 1"
MIB = 1 << 20


def parameter_groups(model: nn.Module, plan: Plan, version: str, layerwise: bool) -> list[dict[str, Any]]:
    """Trainable parameters of `model`, grouped by the rates of their profile rows.

    Each group carries `lr_init`, `lr_final`, `weight_decay` (and as `decay_init` what it begins with) and the
    parameters' names. The rates of the tensors that an adapter calls its factor B are multiplied by `plan.lora_plus`.
    Raises ValueError when nothing trains.
    """
    factors_b = {f"{name}.{part}" for name, layer in matrices(model) for part in layer.factor_b}
    members: dict[Rates, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates = plan.group(name, version, layerwise)
            times = plan.lora_plus if name in factors_b else 1.0
            rates = Rates(rates.lr_init * times, rates.lr_final * times, rates.weight_decay)
            members[rates].append((name, parameter))
    if not members:
        raise ValueError(NOTHING)
    return [
        {
            "params": [parameter for _, parameter in group],
            "names": [name for name, _ in group],
            "lr": rates.lr_init,
            "decay_init": rates.weight_decay,
            **rates._asdict(),
        }
        for rates, group in members.items()
    ]


def check_optimizer(config: Config) -> None:
    """Raises ValueError, before anything is loaded, when --optim cannot run here."""
    facts = OPTIMIZERS[config.optim]
    if facts.needs and importlib.util.find_spec(facts.needs) is None:
        raise ValueError(f"{{optim}} {config.optim} needs the package {facts.needs}: pip install {facts.needs}")
    offloaded = tables.STRATEGIES[config.strategy].offload
    if facts.host and not offloaded and device_for(config.accelerator) != "cpu":
        raise ValueError(
            f"{{optim}} {config.optim} runs on the host, and what trains lies on the GPU: use a {{strategy}} that ends "
            "in _offload, or {optim} adamw"
        )


def make_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that --optim names over the groups of `parameter_groups`, and whatever that is, a lazy Adam for
    tables by token. Raises ValueError in one sentence."""
    make = load(OPTIMIZERS[config.optim].implementation)
    betas = (config.beta1, config.beta2)
    by_token, others = parted(groups, lambda name, _: is_token_table(name))
    if not by_token:
        whole: torch.optim.Optimizer = make(groups, betas, config.adam_eps)
        return whole
    lazy = LazyAdam(by_token, betas, config.adam_eps)
    if not others:
        return lazy
    optimizer = make(others, betas, config.adam_eps)
    parts = optimizer.parts if isinstance(optimizer, Together) else [optimizer]
    return Together([*parts, lazy])


def parted(
    groups: Iterable[dict[str, Any]], chosen: Callable[[str, Tensor], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of the tensors that are `chosen`, by name and parameter, and those of the others; none is empty."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        members = list(zip(group["names"], group["params"], strict=True))
        for own, into in found.items():
            part = [(name, p) for name, p in members if chosen(name, p) is own]
            if part:
                into.append(group | {"names": [name for name, _ in part], "params": [p for _, p in part]})
    return found[True], found[False]


def takes(optim: str, name: str, parameter: Tensor) -> bool:
    """Whether the optimizer updates the tensor `name` in its own way; else in AdamW's, with float32 moments, or, of
    a table by token, in lazy Adam's."""
    facts = OPTIMIZERS[optim]
    if is_token_table(name):
        return False
    if facts.matrices and not (parameter.dim() == 2 and is_block_matrix(name)):
        return False
    return parameter.numel() >= facts.least


class StateSize(NamedTuple):
    """What an optimizer keeps beside the parameters, over all ranks: of `own` numbers in its own way, of `rest` in
    AdamW's, and of `tables` by token, whose rows get moments when they first occur, at most."""

    optim: str
    own: int
    rest: int
    tables: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of its state."""
        facts = OPTIMIZERS
        return round(self.own * facts[self.optim].state_bytes + (self.rest + self.tables) * facts[ADAMW].state_bytes)

    def line(self) -> str:
        """In a sentence."""
        rest = f", AdamW for {self.rest:,}" if self.rest else ""
        lazy = f", lazy Adam for {self.tables:,} in tables" if self.tables else ""
        size = f"{'at most ' if self.tables else ''}{self.bytes / MIB:,.1f} MiB"
        return f"optimizer: {self.optim} for {self.own:,} numbers{rest}{lazy}, {size} of state"


def state_of(optim: str, model: nn.Module) -> StateSize:
    """The size of the state of --optim for the trainable parameters of `model`, which may lie on the meta device."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = sum(p.numel() for name, p in trained if takes(optim, name, p))
    rows = sum(p.numel() for name, p in trained if is_token_table(name))
    return StateSize(optim, own, sum(p.numel() for _, p in trained) - own - rows, rows)


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW with decoupled decay and float32 moments, in one fused pass over memory on a CPU and on GPUs."""
    return torch.optim.AdamW(list(groups), betas=betas, eps=eps, fused=True)
