"""A new model's tensors for training from zero, as the tradition has them; each version's values are in its own file.

Legend: C width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.blocks import Block
from rwkv_rlhf.model.position import Position
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import with_fact


def initial_tensors(
    version: str,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    seed: int = 0,
    dim_ffn: int | None = None,
) -> dict[str, Tensor]:
    """A fresh model's tensors, float32, under the tradition's names; the same seed gives the same bits.

    Raises ValueError for a version that nobody makes any more and for sizes that do not fit together.
    """
    _check_new(version)
    if not tables.VERSIONS[version].heads:
        head_size = 1
    if n_embd % head_size or n_embd % 32:
        raise ValueError(f"--n_embd {n_embd} must be a multiple of the head size {head_size} and of 32")
    block = VERSIONS[version]
    generator = torch.Generator().manual_seed(max(seed, 0))
    C, ffn = n_embd, dim_ffn or int(n_embd * block.channel_mix.widening) // 32 * 32
    tensors = {"emb.weight": torch.empty(vocab_size, C).uniform_(-1e-4, 1e-4, generator=generator)}
    for layer in range(n_layer):
        at = Position(layer, n_layer, C, head_size, ffn, generator)
        tensors |= _values(block, at)
    tensors["ln_out.weight"], tensors["ln_out.bias"] = torch.ones(C), torch.zeros(C)
    gain = 0.5 * math.sqrt(vocab_size / C) if vocab_size > C else 0.5
    tensors["head.weight"] = at.orthogonal(vocab_size, C, gain)
    return tensors


def _check_new(version: str) -> None:
    new = with_fact(tables.VERSIONS, lambda facts: facts.new)
    if version not in new:
        raise ValueError(f"--my_testing {version}: new models are made as {', '.join(new)}")


def _values(block: type[Block], at: Position) -> dict[str, Tensor]:
    """The tensors of the block at this position."""
    prefix, tensors = f"blocks.{at.layer}.", {}
    for norm in ("ln0", "ln1", "ln2") if at.layer == 0 else ("ln1", "ln2"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(at.C)
        tensors[f"{prefix}{norm}.bias"] = torch.zeros(at.C)
    tensors |= {f"{prefix}att.{name}": value for name, value in block.time_mix.initial_values(at).items()}
    return tensors | {f"{prefix}ffn.{name}": value for name, value in block.channel_mix.initial_values(at).items()}


def block_tensors(sizes: Sizes, layer: int, seed: int) -> dict[str, Tensor]:
    """Initial values of one block of a model that exists, float32; the same seed and layer give the same bits.

    Raises ValueError for a version that nobody makes any more.
    """
    _check_new(sizes.version)
    generator = torch.Generator().manual_seed(max(seed, 0) * 1000 + layer)
    at = Position(layer, sizes.n_layer, sizes.n_embd, sizes.head_size, sizes.dim_ffn, generator, sizes.low_rank)
    return _values(VERSIONS[sizes.version], at)


def end_tensors(sizes: Sizes) -> dict[str, Tensor]:
    """Initial values of the norm behind the last block."""
    return {"ln_out.weight": torch.ones(sizes.n_embd), "ln_out.bias": torch.zeros(sizes.n_embd)}
