"""The names and shapes of RWKV-7 in Hugging Face's layout (that of flash-linear-attention and rwkv7-hf), both ways.

| here | there |
|---|---|
| `emb`, `ln_out`, `head` | `model.embeddings`, `model.norm`, `lm_head` |
| `blocks.N.ln0`, `.ln1`, `.ln2` | `model.layers.N.pre_norm`, `.attn_norm`, `.ffn_norm` |
| `att.receptance`, `.key`, `.value`, `.output`, `.ln_x` | `attn.r_proj`, `.k_proj`, `.v_proj`, `.o_proj`, `.g_norm` |
| `att.w0`, `.w1`, `.w2`, and so `a`, `v`, `g` | `attn.w_lora.lora.2.bias`, `.0.weight` and `.2.weight` transposed |
| vectors (1, 1, C) | (C,), but `attn.x_*` as they are |

Block 0 has no value mixing there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

ENDS = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
HALVES = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
LAYERS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
FACTORS = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
FACTOR = re.compile(r"([wavg])([012])")
UNUSED = re.compile(r"blocks\.0\.att\.v[012]")


def hf_name(name: str) -> str:
    """What the tensor `name` is called there; "" for what has no place."""
    words = name.split(".")
    if words[0] in ENDS:
        return ".".join([ENDS[words[0]], *words[1:]])
    if words[0] != "blocks" or words[2] not in HALVES or UNUSED.fullmatch(name):
        return ""
    _, number, half, part, *rest = words
    if half == "att" and (factor := FACTOR.fullmatch(part)):
        part, rest = f"{factor[1]}_lora", [FACTORS[factor[2]]]
    elif half == "att":
        part = LAYERS.get(part, part)
    return ".".join(["model.layers", number, HALVES[half], part, *rest])


def hf_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor `name` of this program as it lies there; a view where it can be."""
    half, _, part = name.rpartition(".")
    if (factor := FACTOR.fullmatch(part)) and factor[2] != "0":
        return tensor.t()
    mixes = half.endswith(".att") and part.startswith("x_")
    return tensor.flatten() if tensor.dim() == 3 and not mixes else tensor


def is_hf(names: Iterable[str]) -> bool:
    """Whether tensors have the names of that layout."""
    return {"model.embeddings.weight", "lm_head.weight"} <= set(names)


def own_tensors(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by the names and in the shapes of this program. Raises ValueError for names that it does not know.

    Tensors stay where they lie: transposed ones are views.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        own = own_name(name)
        if not own:
            raise ValueError(f"{name} is no tensor of RWKV-7 in Hugging Face's layout")
        part = own.rpartition(".")[2]
        factor = FACTOR.fullmatch(part)
        if factor and factor[2] != "0":
            tensor = tensor.t() if tensor.dim() == 2 else tensor
        elif factor or re.fullmatch(r"x_[a-z]|k_[ka]", part):
            tensor = tensor.reshape(1, 1, -1)
        elif ".ln_x." in own:
            tensor = tensor.flatten()  # MLX keeps it by heads
        found[own] = tensor
    return found


def own_name(theirs: str) -> str:
    """The inverse of `hf_name`; "" for a name that is none of theirs."""
    for own, end in ENDS.items():
        if theirs.startswith(f"{end}."):
            return theirs.replace(end, own, 1)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", theirs)
    halves = {name: own for own, name in HALVES.items()}
    if match is None or match[2] not in halves:
        return ""
    half, part = halves[match[2]], match[3]
    if half == "att":
        kinds = {name: own for own, name in FACTORS.items()}
        if low_rank := re.fullmatch(r"([wavg])_lora\.(.+)", part):
            if low_rank[2] not in kinds:
                return ""
            part = low_rank[1] + kinds[low_rank[2]]
        else:
            layer, _, rest = part.partition(".")
            layers = {name: own for own, name in LAYERS.items()}
            part = ".".join(filter(None, (layers.get(layer, layer), rest)))
    return f"blocks.{match[1]}.{half}.{part}"
