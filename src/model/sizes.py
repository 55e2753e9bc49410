"""What a checkpoint says about itself: its RWKV version and its sizes.

Everything here is read from the names and shapes of the tensors; a flag that says otherwise is the user's mistake and
is refused with both numbers (`check_flags`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

_LAYER = re.compile(r"^blocks\.(\d+)\.")

# The spellings of --my_testing that name each version.
ALIASES = {
    "x040": "x040",
    "r3r4": "x052",
    "x052": "x052",
    "x060": "x060",
    "x070": "x070",
}

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

    x070: `w`, `a`, `v`, `g`. x060: `mix`, `decay`. Others: empty. `head_size` of x040 is 1: its channels do not mix.
    """

    version: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    dim_att: int
    dim_ffn: int
    low_rank: dict[str, int] = field(default_factory=dict)

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size


def version_of(names: Iterable[str]) -> str:
    """RWKV version told by the parameter names. Raises ValueError when they are not those of an RWKV model."""
    names = set(names)
    if "emb.weight" not in names or "head.weight" not in names:
        missing = "emb.weight" if "emb.weight" not in names else "head.weight"
        raise ValueError(f"not an RWKV checkpoint: it has no {missing}")
    att = {name.removeprefix("blocks.0.att.") for name in names if name.startswith("blocks.0.att.")}
    if "r_k" in att and "x_r" in att:
        return "x070"
    if "time_maa_w1" in att:
        return "x060"
    if "time_faaaa" in att and "time_decay" in att and "gate.weight" in att:
        return "x052"
    if "time_first" in att and "time_mix_k" in att and "ln_x.weight" not in att:
        return "x040"
    raise ValueError("not a known RWKV version (x040, x052, x060, x070): blocks.0.att does not look like any of them")


def _count_layers(names: Iterable[str]) -> int:
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    gaps = sorted(set(range(max(layers) + 1)) - layers)
    if gaps:
        raise ValueError(f"the checkpoint has layers up to {max(layers)} but no layer {gaps[0]}")
    return len(layers)


def _shape(tensors: Mapping[str, torch.Tensor], name: str, dims: int) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"not a whole RWKV checkpoint: it has no {name}")
    shape = tensors[name].shape
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {dims} dimensions")
    return shape


def _low_rank(tensors: Mapping[str, torch.Tensor], version: str, n_layer: int) -> dict[str, int]:
    if version == "x060":
        mix = _shape(tensors, "blocks.0.att.time_maa_w1", 2)[1]
        return {"mix": mix // 5, "decay": _shape(tensors, "blocks.0.att.time_decay_w1", 2)[1]}
    if version == "x070":
        ranks = {part: _shape(tensors, f"blocks.0.att.{part}1", 2)[1] for part in ("w", "a", "g")}
        # layer 0 makes the values that later layers mix in, so only layer 1 is sure to have v1
        if n_layer > 1:
            ranks["v"] = _shape(tensors, "blocks.1.att.v1", 2)[1]
        elif "blocks.0.att.v1" in tensors:
            ranks["v"] = _shape(tensors, "blocks.0.att.v1", 2)[1]
        else:
            ranks["v"] = ranks["a"]
        return ranks
    return {}


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
    if version == "x040":
        head_size = 1
    else:
        name = "blocks.0.att.r_k" if version == "x070" else "blocks.0.att.time_faaaa"
        heads, head_size = _shape(tensors, name, 2)
        if heads * head_size != dim_att:
            raise ValueError(f"{name} is {(heads, head_size)} but blocks.0.att.key.weight has {dim_att} rows")
    low_rank = _low_rank(tensors, version, n_layer)
    return Sizes(version, n_layer, n_embd, vocab_size, head_size, dim_att, dim_ffn, low_rank)


def check_flags(sizes: Sizes, **typed: int | str | None) -> None:
    """Refuse what the user typed where the checkpoint says otherwise.

    `typed` holds fields of `Sizes` by name; None, 0 and "" mean "not given". Raises ValueError naming both values.
    """
    for name, value in typed.items():
        assert name in _FLAGS, name
        if not value:
            continue
        if name == "head_size" and sizes.version == "x040":
            continue
        found = getattr(sizes, name)
        if name == "version":
            wanted = ALIASES.get(str(value).lower())
            if wanted is None:
                raise ValueError(f"--my_testing {value}: the known versions are {', '.join(ALIASES)}")
        else:
            wanted = value
        if wanted != found:
            raise ValueError(f"{_FLAGS[name]} is {value} but the checkpoint has {name} {found}: leave the flag out")
