"""Which tensor learns, and in which optimizer group: a row per layer. No torch here, the plan speaks of names only."""

import dataclasses
import re
from typing import NamedTuple

from rwkv_rlhf.settings import tables

PARTS = ("att", "ffn", "ln", "time")


class Rates(NamedTuple):
    """Learning rate at the beginning and at the end of training, and weight decay."""

    lr_init: float
    lr_final: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What one layer does. Rates go from `init` to `final`; `reject` holds substrings of names that stay frozen.

    `where` is the place of the row in a profile, file and line, for messages.
    """

    layer: str
    mode: str
    rank: int
    alpha: float
    dropout: float
    lr_init: float
    lr_final: float
    weight_decay: float
    state_lr_init: float
    state_lr_final: float
    reject: tuple[str, ...] = ()
    where: str = dataclasses.field(default="", compare=False)

    def rejects(self, name: str) -> bool:
        """Whether the parameter `name` is frozen by RejectParts."""
        return any(part in name for part in self.reject)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One row for emb, for each block, for head and for the run's scalar head, the parts of a block that adapter rows
    touch, and which learnt initial states (names as in `blocks.0.<name>`) every block trains, whatever its mode.
    `lora_plus` multiplies the learning rate of LoRA's factor B (arXiv 2402.12354). `scalar_head` is the one that the
    run has a row for: others stay as they are; without `predicts` the head of the tokens has nothing to learn, and is
    left alone. `tables`: whether the tables by token of a block (DeepEmbed) train with it."""

    rows: dict[str, Row]
    parts: frozenset[str] = frozenset(PARTS)
    states: tuple[str, ...] = ()
    lora_plus: float = 1.0
    scalar_head: str = ""
    predicts: bool = True
    tables: bool = False

    @property
    def modes(self) -> frozenset[str]:
        """The modes that occur."""
        return frozenset(row.mode for row in self.rows.values())

    def row_of(self, name: str) -> Row:
        """The row that the parameter or module `name` belongs to, e.g. `blocks.3.att.key.weight` to row 3."""
        words = name.split(".")
        if words[0] == "emb" or (words[0] == "blocks" and words[2:3] == ["ln0"]):
            return self.rows["emb"]
        if words[0] == "blocks":
            return self.rows[words[1]]
        assert words[0] in ("head", "ln_out", *tables.SCALAR_HEADS), f"no row for {name}"
        return self.rows[words[0] if words[0] in self.rows else "head"]

    def foreign(self, name: str) -> bool:
        """Whether `name` belongs to a scalar head that this run has no use for."""
        return is_scalar_head(name) and name.split(".")[0] != self.scalar_head

    def trains(self, name: str, version: str, limited: bool) -> bool:
        """Whether the tensor `name`, which is no adapter's, learns.

        version: x040 to x070a, for the names of the small tensors; limited: adapter rows train their adapters only.
        """
        row = self.row_of(name)
        if self.foreign(name):
            return False
        if row.rejects(name) or (name == "head.weight" and not self.predicts):
            return False
        if is_token_table(name):
            touched = row.mode == "full" or (row.mode in tables.ADAPTERS and name.split(".")[2] in self.parts)
            return self.tables and touched
        if is_state(name):
            return name.endswith(self.states)
        if row.mode == "full":
            return True
        if row.mode == "freeze" or limited:
            return False
        if is_norm(name):
            return "ln" in self.parts
        return is_small(name, version) and "time" in self.parts

    def adapts(self, linear_name: str) -> Row | None:
        """The row whose adapter the matrix of the module `linear_name` (e.g. `blocks.3.att.key`) gets, or None."""
        row = self.row_of(linear_name)
        weight = f"{linear_name}.weight"
        if row.mode not in tables.ADAPTERS or row.rejects(weight) or is_token_table(weight):
            return None
        if (linear_name == "head" and not self.predicts) or self.foreign(weight):
            return None
        words = linear_name.split(".")
        if words[0] == "blocks" and words[2] in ("att", "ffn") and words[2] not in self.parts:
            return None
        return row

    def group(self, name: str, version: str, layerwise: bool) -> Rates:
        """The rates of the trained tensor `name`, adapters' tensors included.

        layerwise: apply the tradition's multipliers. Only matrices decay: no LayerNorm, small tensor or table by token.
        """
        row = self.row_of(name)
        if is_state(name):
            return Rates(row.state_lr_init, row.state_lr_final, 0.0)
        times = tables.VERSIONS[version].rates.get(name.split(".")[-1], 1.0) if layerwise else 1.0
        decay = row.weight_decay if is_matrix(name) else 0.0
        return Rates(row.lr_init * times, row.lr_final * times, decay)


def is_state(name: str) -> bool:
    """Whether `name` is a learnt initial state (state tuning)."""
    return name.split(".")[-1].endswith("_state")


def is_scalar_head(name: str) -> bool:
    """Whether `name` belongs to a scalar head (a reward model's, PPO's)."""
    return name.split(".")[0] in tables.SCALAR_HEADS


def is_token_table(name: str) -> bool:
    """Whether `name`, of a model's or of a block's tensor, is a table by token inside a block, which nothing adapts or
    packs (DeepEmbed)."""
    return any(f".{name}".endswith(f".{table}") for facts in tables.VERSIONS.values() for table in facts.token_tables)


def is_new(name: str) -> bool:
    """Whether the base model may lack the tensor `name`, which training added."""
    return is_state(name) or is_scalar_head(name)


def is_norm(name: str) -> bool:
    """Whether `name` is the weight or bias of a LayerNorm or of ln_x."""
    return name.split(".")[-2].startswith("ln")


def is_small(name: str, version: str) -> bool:
    """Whether `name` is one of the small vectors or low-rank factors of a block."""
    last = name.split(".")[-1]
    return re.fullmatch(tables.VERSIONS[version].small, last) is not None


def is_matrix(name: str) -> bool:
    """Whether `name` is a whole matrix (a table by token is none) or a factor of an adapter: what may decay."""
    last = name.split(".")[-1]
    own = any(last in facts.decays for facts in tables.ADAPTERS.values())
    return own or (last == "weight" and not is_norm(name) and not is_token_table(name))


def is_block_matrix(name: str) -> bool:
    """Whether `name` is a matrix, or a factor of an adapter, inside a block: not of the embedding or the head."""
    return name.startswith("blocks.") and is_matrix(name)


def row_modes() -> tuple[str, ...]:
    """The modes that a row of a layer profile may have."""
    return ("full", "freeze", *tables.ADAPTERS)


def is_scaled(mode: str) -> bool:
    """Whether a row's update is scaled by Alpha / Rank."""
    return mode in tables.ADAPTERS and tables.ADAPTERS[mode].scaled


def layer_names(n_layer: int) -> list[str]:
    """emb, 0, 1, ..., head."""
    return ["emb", *map(str, range(n_layer)), "head"]
