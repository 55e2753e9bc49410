"""What a checkpoint says about itself: its RWKV version and its sizes.

Everything here is read from the names and shapes of the tensors; a flag that says otherwise is the user's mistake and
is refused with both numbers (`check_flags`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from rwkv_rlhf.settings import tables

_LAYER = re.compile(r"^blocks\.(\d+)\.")

# Learnt initial states: that of the recurrence, and what the two token shifts see before the first token.
STATES = ("att.time_state", "att.shift_state", "ffn.shift_state")

# The flag by which the user states each size.
_FLAGS = {
    "version": "--my_testing",
    "n_layer": "--n_layer",
    "n_embd": "--n_embd",
    "vocab_size": "--vocab_size",
    "head_size": "--head_size_a",
    "dim_att": "--dim_att",
    "dim_ffn": "--dim_ffn",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model. `low_rank` holds the inner widths of the low-rank factors.

    x070: `w`, `a`, `v`, `g`; x070a `deep` besides. x060: `mix`, `decay`. Others: empty. `head_size` of x040 is 1: its
    channels do not mix.
    `bonus` is the tensor that weighs the current token: time_first, in x050 and x051 its logarithm, or time_faaaa.
    `states` are the learnt initial states that each block has, of `STATES`; `heads` the scalar heads that there are.
    """

    version: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    dim_att: int
    dim_ffn: int
    low_rank: dict[str, int] = field(default_factory=dict)
    bonus: str = "time_faaaa"
    states: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size


def version_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """RWKV version told by names and shapes. Raises ValueError when they are not those of an RWKV model.

    x050 to x052 are RWKV-5.0, 5.1 and 5.2: one decay per head, the same with a gate, one decay per channel with a gate.
    """
    for name in ("emb.weight", "head.weight"):
        if name not in tensors:
            raise ValueError(f"not an RWKV checkpoint: it has no {name}")
    for other, signs in tables.OTHER_VERSIONS.items():
        if all(f"blocks.0.{sign}" in tensors for sign in signs):
            raise ValueError(f"{other}, as blocks.0.{signs[-1]} tells: that version is not built")
    first = "blocks.0."
    inside = {name.removeprefix(first): tensor.shape for name, tensor in tensors.items() if name.startswith(first)}
    att = {name.removeprefix("att."): shape for name, shape in inside.items()}
    by_channel = "time_decay" in att and max(att["time_decay"][1:], default=1) > 1
    found = [
        version
        for version, facts in tables.VERSIONS.items()
        if facts.has <= att.keys() and not facts.lacks & att.keys() and facts.per_channel in (None, by_channel)
    ]
    has = {version: tables.VERSIONS[version].has for version in found}
    found = [version for version in found if not any(has[version] < has[other] for other in found)]
    if len(found) != 1:
        known = ", ".join(tables.VERSIONS)
        raise ValueError(f"not a known RWKV version ({known}): blocks.0.att does not look like any of them")
    return found[0]


def _count_layers(names: Iterable[str]) -> int:
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    gap = next(number for number in range(len(layers) + 1) if number not in layers)
    if gap < len(layers):
        raise ValueError(f"the checkpoint has layers up to {max(layers)} but no layer {gap}")
    return len(layers)


def _shape(tensors: Mapping[str, torch.Tensor], name: str, dims: int | None = None) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"not a whole RWKV checkpoint: it has no {name}")
    shape = tensors[name].shape
    if dims is not None and len(shape) != dims:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {dims} dimensions")
    return shape


def _low_rank(tensors: Mapping[str, torch.Tensor], version: str) -> dict[str, int]:
    """Inner widths; block 1 is asked too, as block 0 may lack a part (x070's v, of which it is the source)."""
    ranks = {}
    for part, names in tables.VERSIONS[version].low_rank.items():
        inside = [name if name.startswith("ffn.") else f"att.{name}" for name in names]
        places = [f"blocks.{layer}.{name}" for name in inside for layer in (0, 1)]
        name = next((name for name in places if name in tensors), places[0])
        shape = _shape(tensors, name)
        if len(shape) < 2:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected a matrix")
        ranks[part] = shape[1]
    return ranks


def _head_size(tensors: Mapping[str, torch.Tensor], version: str, dim_att: int) -> int:
    if not tables.VERSIONS[version].heads:
        return 1
    name = f"blocks.0.att.{tables.VERSIONS[version].heads}"
    if name.endswith("time_decay"):
        heads = tensors[name].numel()
        size = dim_att // max(1, heads)
    else:
        heads, size = _shape(tensors, name, 2)
    if heads * size != dim_att:
        shape = tuple(tensors[name].shape)
        raise ValueError(f"{name} is {shape} but blocks.0.att.key.weight has {dim_att} rows")
    return size


def sizes_of(tensors: Mapping[str, torch.Tensor]) -> Sizes:
    """Sizes of a flat state dict (only names and shapes are looked at, so meta tensors do).

    Raises ValueError, without a file name, when the tensors are not those of an RWKV model.
    """
    version = version_of(tensors)
    n_layer = _count_layers(tensors)
    vocab_size, n_embd = _shape(tensors, "emb.weight", 2)
    head = _shape(tensors, "head.weight", 2)
    if tuple(head) != (vocab_size, n_embd):
        raise ValueError(f"emb.weight is {(vocab_size, n_embd)} but head.weight is {tuple(head)}: they must agree")
    dim_att = _shape(tensors, "blocks.0.att.key.weight", 2)[0]
    dim_ffn = _shape(tensors, "blocks.0.ffn.key.weight", 2)[0]
    bonus = "time_first" if "blocks.0.att.time_first" in tensors else "time_faaaa"
    head_size = _head_size(tensors, version, dim_att)
    low_rank = _low_rank(tensors, version)
    states, heads = states_in(tensors), heads_in(tensors)
    for head_name in heads:
        shape = _shape(tensors, f"{head_name}.weight", 2)
        if tuple(shape) != (1, n_embd):
            raise ValueError(f"{head_name}.weight is {tuple(shape)}, expected {(1, n_embd)}")
    return Sizes(version, n_layer, n_embd, vocab_size, head_size, dim_att, dim_ffn, low_rank, bonus, states, heads)


def heads_in(names: Iterable[str]) -> tuple[str, ...]:
    """Which scalar heads the tensors of a checkpoint have."""
    found = set(names)
    return tuple(head for head in tables.SCALAR_HEADS if f"{head}.weight" in found)


def states_in(names: Iterable[str]) -> tuple[str, ...]:
    """Which of `STATES` the tensors of a checkpoint have, in some block at least."""
    found = {".".join(name.split(".")[2:]) for name in names if name.endswith("_state")}
    return tuple(state for state in STATES if state in found)


def check_flags(sizes: Sizes, **flags: int | str | None) -> None:
    """Refuse sizes that the user gave where the checkpoint says otherwise.

    `flags` holds fields of `Sizes` by name; None, 0 and "" mean "not given". Raises ValueError naming both values.
    """
    for name, value in flags.items():
        assert name in _FLAGS, name
        if not value:
            continue
        if name == "head_size" and not tables.VERSIONS[sizes.version].heads:
            continue
        found = getattr(sizes, name)
        given: int | str = value
        if name == "version":
            known = {word: v for v, facts in tables.VERSIONS.items() if facts.new for word in (*facts.spellings, v)}
            if str(value).lower() not in known:
                raise ValueError(f"--my_testing {value}: the known versions are {', '.join(known)}")
            given = known[str(value).lower()]
        if given != found:
            raise ValueError(f"{_FLAGS[name]} is {value} but the checkpoint has {name} {found}: leave the flag out")
