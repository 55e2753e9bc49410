"""Initial values for training from zero, as the tradition has them.

Source: RWKV-LM 524481d, RWKV-v7/train_temp/src/model.py (constructors and `generate_init_weight`).
Legend: C width, A attention width, H heads, N head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def low_rank_sizes(width: int) -> dict[str, int]:
    """The tradition's inner sizes of the data-dependent vectors of x070 for a model of this width."""

    def multiple_of_32(factor: float) -> int:
        return max(32, round(factor * math.sqrt(width) / 32) * 32)

    return {"w": multiple_of_32(2.5), "a": multiple_of_32(2.5), "v": multiple_of_32(1.7), "g": multiple_of_32(5)}


def _orthogonal(shape: tuple[int, int], gain: float, generator: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)


def _small_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    gain = math.sqrt(rows / columns) if rows > columns else 1.0
    return _orthogonal((rows, columns), 0.1 * gain, generator)


def _time_mix_x070(layer: int, n_layer: int, C: int, N: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of `blocks.{layer}.att.` (C = A here: the tradition has no other)."""
    depth = layer / max(1, n_layer - 1)  # 0 .. 1
    height = 1.0 - layer / n_layer  # 1 .. almost 0
    channel = torch.arange(C, dtype=torch.float32)
    ramp = (channel / C).view(1, 1, C)
    linear = channel / max(1, C - 1) - 0.5
    zigzag = (channel % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    decay = -6 + 6 * (channel / max(1, C - 1)) ** (1 + depth**0.3)
    rank = low_rank_sizes(C)
    powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    t = {name: 1.0 - ramp ** (power * height) for name, power in powers.items()}
    offsets = {
        "w": decay + 0.5 + zigzag * 2.5,
        "a": -0.19 + zigzag * 0.3 + linear * 0.4,
        "v": 0.73 - linear * 0.4,
    }
    for name, offset in offsets.items():
        t[f"{name}0"] = offset.view(1, 1, C).clone()
        t[f"{name}1"] = torch.zeros(C, rank[name])
        t[f"{name}2"] = _small_orthogonal(rank[name], C, generator)
    t["g1"] = torch.zeros(C, rank["g"])
    t["g2"] = _small_orthogonal(rank["g"], C, generator)
    t["k_k"] = (0.71 - linear * 0.1).view(1, 1, C)
    t["k_a"] = torch.full((1, 1, C), 1.02)
    t["r_k"] = torch.full((C // N, N), -0.04)
    t["receptance.weight"] = _orthogonal((C, C), 1.0, generator)
    t["key.weight"] = _orthogonal((C, C), 0.1, generator)
    t["value.weight"] = _orthogonal((C, C), 1.0, generator)
    t["output.weight"] = torch.zeros(C, C)
    t["ln_x.weight"] = torch.full((C,), ((1 + layer) / n_layer) ** 0.7)
    t["ln_x.bias"] = torch.zeros(C)
    return t


def _channel_mix_x070(layer: int, n_layer: int, C: int, ffn: int, generator: torch.Generator) -> dict[str, Tensor]:
    height = 1.0 - layer / n_layer
    ramp = (torch.arange(C, dtype=torch.float32) / C).view(1, 1, C)
    return {
        "x_k": 1.0 - ramp ** (height**4),
        "key.weight": _orthogonal((ffn, C), 1.0, generator),
        "value.weight": torch.zeros(C, ffn),
    }


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

    Raises ValueError for a version without a table of initial values and for sizes that do not fit together.
    """
    if version != "x070":
        raise ValueError(f"--my_testing {version}: initial values exist for x070 only so far")
    if n_embd % head_size or n_embd % 32:
        raise ValueError(f"--n_embd {n_embd} must be a multiple of the head size {head_size} and of 32")
    generator = torch.Generator().manual_seed(max(seed, 0))
    C = n_embd
    tensors = {"emb.weight": torch.empty(vocab_size, C).uniform_(-1e-4, 1e-4, generator=generator)}
    for layer in range(n_layer):
        prefix = f"blocks.{layer}."
        for norm in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(C)
            tensors[f"{prefix}{norm}.bias"] = torch.zeros(C)
        att = _time_mix_x070(layer, n_layer, C, head_size, generator)
        ffn = _channel_mix_x070(layer, n_layer, C, dim_ffn or 4 * C, generator)
        tensors.update({f"{prefix}att.{name}": value for name, value in att.items()})
        tensors.update({f"{prefix}ffn.{name}": value for name, value in ffn.items()})
    tensors["ln_out.weight"], tensors["ln_out.bias"] = torch.ones(C), torch.zeros(C)
    gain = 0.5 * math.sqrt(vocab_size / C) if vocab_size > C else 0.5
    tensors["head.weight"] = _orthogonal((vocab_size, C), gain, generator)
    return tensors
