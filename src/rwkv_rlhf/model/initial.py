"""Initial values for training from zero, as the tradition has them.

Source: RWKV-LM 524481d, constructors and `generate_init_weight` of RWKV-v4neo/src/model.py (x040), RWKV-v5/src/model.py
(x052, x060) and RWKV-v7/train_temp/src/model.py (x070).
Legend: C width, A attention width, H heads, N head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.implementations import load, with_fact


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


class Place(NamedTuple):
    """Where in the model a block is, and what its sizes are (A = C: the tradition has no other)."""

    layer: int
    n_layer: int
    C: int
    N: int
    ffn: int
    generator: torch.Generator

    @property
    def depth(self) -> float:
        """0 in the first block, 1 in the last."""
        return self.layer / max(1, self.n_layer - 1)

    @property
    def height(self) -> float:
        """1 in the first block, almost 0 in the last."""
        return 1.0 - self.layer / self.n_layer

    def channels(self) -> Tensor:
        """0, 1, ..., C - 1."""
        return torch.arange(self.C, dtype=torch.float32)

    def power(self, exponent: float) -> Tensor:
        """(c / C)^exponent, (1, 1, C)."""
        return ((self.channels() / self.C) ** exponent).view(1, 1, self.C)

    def slope(self) -> Tensor:
        """From 0 to 1 over the channels, (C,)."""
        return self.channels() / max(1, self.C - 1)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in +-0.01."""
        return torch.empty(shape).uniform_(-0.01, 0.01, generator=self.generator)

    def orthogonal(self, rows: int, columns: int, gain: float) -> Tensor:
        """Orthogonal rows or columns times `gain`; zeros for 0."""
        return _orthogonal((rows, columns), gain, self.generator) if gain else torch.zeros(rows, columns)


def _zigzag(place: Place) -> Tensor:
    """0, 1, -1, 0, 1, -1, ...: neighbours differ (C,)."""
    return (place.channels() + 1) % 3 - 1


def _kept_shares(place: Place) -> dict[str, Tensor]:
    """How much of each token's own input k, v, r and g see at first (x040 to x060)."""
    key, gate = place.power(place.height), place.power(0.5 * place.height)
    return {"k": key, "v": key + 0.3 * place.depth, "r": gate, "g": gate.clone()}


def _gated_ffn(place: Place, key_gain: float) -> dict[str, Tensor]:
    C, ffn = place.C, place.ffn
    return {
        "key.weight": place.orthogonal(ffn, C, key_gain),
        "receptance.weight": torch.zeros(C, C),
        "value.weight": torch.zeros(C, ffn),
    }


def _time_mix_x040(place: Place) -> dict[str, Tensor]:
    C, shares = place.C, _kept_shares(place)
    t = {
        "time_decay": -5 + 8 * place.slope() ** (0.7 + 1.3 * place.depth),
        "time_first": math.log(0.3) + 0.5 * _zigzag(place),
    }
    t |= {f"time_mix_{name}": shares[name] for name in "kvr"}
    t["key.weight"] = torch.zeros(C, C)
    t["value.weight"] = place.orthogonal(C, C, 1.0)
    t["receptance.weight"] = torch.zeros(C, C)
    t["output.weight"] = torch.zeros(C, C)
    return t


def _channel_mix_x040(place: Place) -> dict[str, Tensor]:
    shares = {f"time_mix_{name}": place.power(place.height) for name in "kr"}
    return shares | _gated_ffn(place, math.sqrt(max(1.0, place.ffn / place.C)))


def _attention_of_heads(place: Place) -> dict[str, Tensor]:
    """What x052 and x060 have in common."""
    C, N = place.C, place.N
    gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "output": 0.0, "gate": 0.1}
    t = {"time_faaaa": (place.depth * (1 - place.slope()) + 0.1 * _zigzag(place)).view(C // N, N)}
    t |= {f"{name}.weight": place.orthogonal(C, C, gain) for name, gain in gains.items()}
    t["ln_x.weight"] = torch.full((C,), ((1 + place.layer) / place.n_layer) ** 0.7)
    t["ln_x.bias"] = torch.zeros(C)
    return t


def _slow_decay(place: Place) -> Tensor:
    return -6 + 5 * place.slope() ** (0.7 + 1.3 * place.depth)


def _time_mix_x052(place: Place) -> dict[str, Tensor]:
    t = {f"time_mix_{name}": share for name, share in _kept_shares(place).items()}
    t["time_decay"] = _slow_decay(place).view(place.C // place.N, place.N)
    return t | _attention_of_heads(place)


def _channel_mix_x052(place: Place) -> dict[str, Tensor]:
    return {f"time_mix_{name}": place.power(place.height) for name in "kr"} | _gated_ffn(place, 1.0)


def _time_mix_x060(place: Place) -> dict[str, Tensor]:
    C, mix, decay = place.C, 32, 64
    shares = {"x": place.power(place.height), "w": place.power(place.height), **_kept_shares(place)}
    t = {f"time_maa_{name}": 1.0 - share for name, share in shares.items()}
    t["time_maa_w1"], t["time_maa_w2"] = torch.zeros(C, 5 * mix), place.uniform(5, mix, C)
    t["time_decay"] = _slow_decay(place).view(1, 1, C)
    t["time_decay_w1"], t["time_decay_w2"] = torch.zeros(C, decay), place.uniform(decay, C)
    return t | _attention_of_heads(place)


def _channel_mix_x060(place: Place) -> dict[str, Tensor]:
    return {f"time_maa_{name}": 1.0 - place.power(place.height**3) for name in "kr"} | _gated_ffn(place, 1.0)


def _time_mix_x070(place: Place) -> dict[str, Tensor]:
    layer, n_layer, C, N, generator = place.layer, place.n_layer, place.C, place.N, place.generator
    channel, depth, height = place.channels(), place.depth, place.height
    linear = channel / max(1, C - 1) - 0.5
    zigzag = (channel % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    decay = -6 + 6 * (channel / max(1, C - 1)) ** (1 + depth**0.3)
    rank = low_rank_sizes(C)
    powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    t = {name: 1.0 - place.power(power * height) for name, power in powers.items()}
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


def _channel_mix_x070(place: Place) -> dict[str, Tensor]:
    return {
        "x_k": 1.0 - place.power(place.height**4),
        "key.weight": place.orthogonal(place.ffn, place.C, 1.0),
        "value.weight": torch.zeros(place.C, place.ffn),
    }


class InitialValues(NamedTuple):
    """Initial values of a version's blocks: tensors of both halves by name, and the width of the feed-forward part as a
    multiple of C, before it is rounded down to a multiple of 32."""

    time_mix: Callable[[Place], dict[str, Tensor]]
    channel_mix: Callable[[Place], dict[str, Tensor]]
    ffn_factor: float


X040 = InitialValues(_time_mix_x040, _channel_mix_x040, 4.0)
X052 = InitialValues(_time_mix_x052, _channel_mix_x052, 3.5)
X060 = InitialValues(_time_mix_x060, _channel_mix_x060, 3.5)
X070 = InitialValues(_time_mix_x070, _channel_mix_x070, 4.0)


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
    facts = tables.VERSIONS.get(version)
    if facts is None or not facts.initial:
        made = with_fact(tables.VERSIONS, lambda facts: facts.initial)
        raise ValueError(f"--my_testing {version}: new models are made as {', '.join(made)}")
    head_size = head_size if facts.heads else 1
    if n_embd % head_size or n_embd % 32:
        raise ValueError(f"--n_embd {n_embd} must be a multiple of the head size {head_size} and of 32")
    values: InitialValues = load(facts.initial)
    generator = torch.Generator().manual_seed(max(seed, 0))
    C, ffn = n_embd, dim_ffn or int(n_embd * values.ffn_factor) // 32 * 32
    tensors = {"emb.weight": torch.empty(vocab_size, C).uniform_(-1e-4, 1e-4, generator=generator)}
    for layer in range(n_layer):
        prefix = f"blocks.{layer}."
        for norm in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(C)
            tensors[f"{prefix}{norm}.bias"] = torch.zeros(C)
        place = Place(layer, n_layer, C, head_size, ffn, generator)
        tensors.update({f"{prefix}att.{name}": value for name, value in values.time_mix(place).items()})
        tensors.update({f"{prefix}ffn.{name}": value for name, value in values.channel_mix(place).items()})
    tensors["ln_out.weight"], tensors["ln_out.bias"] = torch.ones(C), torch.zeros(C)
    gain = 0.5 * math.sqrt(vocab_size / C) if vocab_size > C else 0.5
    tensors["head.weight"] = _orthogonal((vocab_size, C), gain, generator)
    return tensors
