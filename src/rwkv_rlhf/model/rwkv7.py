"""RWKV-7 "Goose" (x070): time mixing by the generalised delta rule and squared-ReLU channel mixing.

Names, shapes and order of operations follow RWKV-LM (RWKV-v7/train_temp/src/model.py) and arXiv 2503.14456.
Legend: B batch, T tokens, C width, A attention width, H heads, N head size, S packed segments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.model import blocks
from rwkv_rlhf.model.blocks import LN_X_EPS, HeadsTimeMix, low_rank, stacked
from rwkv_rlhf.model.position import Position
from rwkv_rlhf.model.program import Decoding
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.model.state import LayerState
from rwkv_rlhf.ops.decode import Finish, Kind
from rwkv_rlhf.ops.elementwise import delta_keys, gated_norm, relu_squared, token_mix, value_gate
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.wkv7 import wkv7

ATT_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def low_rank_sizes(width: int) -> dict[str, int]:
    """The tradition's inner sizes of the data-dependent vectors for a model of this width: multiples of 32."""
    factors = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
    return {name: max(32, round(factor * math.sqrt(width) / 32) * 32) for name, factor in factors.items()}


class TimeMix(HeadsTimeMix):
    """The attention half of a block."""

    recurrence = "wkv7"
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter

    def vector_shapes(self, sizes: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
        C, A, rank = sizes.n_embd, sizes.dim_att, sizes.low_rank
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ATT_MIXES, (1, 1, C))
        for name in "wav" if layer else "wa":  # block 0 is where v_first comes from
            shapes |= {f"{name}0": (1, 1, A), f"{name}1": (C, rank[name]), f"{name}2": (rank[name], A)}
        shapes |= {"g1": (C, rank["g"]), "g2": (rank["g"], A), "k_k": (1, 1, A), "k_a": (1, 1, A)}
        return shapes | {"r_k": (sizes.n_head, sizes.head_size)}

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        C, N, rank = at.C, at.N, at.low_rank or low_rank_sizes(at.C)
        linear = at.slope() - 0.5
        zigzag = (at.channels() % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        decay = -6 + 6 * at.slope() ** (1 + at.depth**0.3)
        powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        offsets = {
            "w": decay + 0.5 + zigzag * 2.5,
            "a": -0.19 + zigzag * 0.3 + linear * 0.4,
            "v": 0.73 - linear * 0.4,
        }
        t = {name: 1.0 - at.power(power * at.height) for name, power in powers.items()}
        for name in "wavg":
            if name in offsets:
                t[f"{name}0"] = offsets[name].view(1, 1, C).clone()
            t[f"{name}1"] = torch.zeros(C, rank[name])
            gain = math.sqrt(rank[name] / C) if rank[name] > C else 1.0
            t[f"{name}2"] = at.orthogonal(rank[name], C, 0.1 * gain)
        t["k_k"] = (0.71 - linear * 0.1).view(1, 1, C)
        t["k_a"] = torch.full((1, 1, C), 1.02)
        t["r_k"] = torch.full((C // N, N), -0.04)
        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "output": 0.0}
        t |= {f"{name}.weight": at.orthogonal(C, C, gain) for name, gain in gains.items()}
        return t | at.norm()

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor | None,
        wkv_state: Tensor | None,
        starts: Starts | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> (output (B, T, C), v_first (B, T, A), wkv state (B or S, H, N, N))."""
        xr, xw, xk, xv, xa, xg = token_mix(x, shift, starts, stacked(self, ATT_MIXES))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # (B, T, A)
        w = self.w0.to(x.dtype) + low_rank(xw, self.w1, self.w2, torch.tanh)
        if v_first is None:
            v_first = v
        else:
            v = value_gate(v, v_first, self.v0.flatten(), low_rank(xv, self.v1, self.v2))
        a12 = low_rank(xa, self.a1, self.a2)
        g = low_rank(xg, self.g1, self.g2, torch.sigmoid)
        k, minus_kk, kk_a = delta_keys(k, self.k_k.flatten(), self.k_a.flatten(), self.a0.flatten(), a12, self.heads)
        split = self.split
        y, wkv_state = wkv7(
            split(r), split(w), split(k), split(v), split(minus_kk), split(kk_a), wkv_state, starts, backend
        )
        y = gated_norm(y, r, k, v, self.r_k, self.ln_x.weight, self.ln_x.bias, g, LN_X_EPS)
        return self.output(y), v_first, wkv_state

    def decode(
        self,
        run: Decoding,
        norm: nn.LayerNorm,
        first: nn.LayerNorm | None,
        carried: Tensor | None,
        state: LayerState,
    ) -> Tensor:
        """As `forward`, for a program; `carried` is v_first."""
        _, xr, xw, xk, xv, xa, xg = run.mixed(self, norm, state.att_shift, lambda: stacked(self, ATT_MIXES), first)
        r, k = run.linear(self.receptance, xr, "r"), run.linear(self.key, xk, "k", beside=True)
        v = run.linear(self.value, xv, "v_first" if carried is None else "v", beside=True)
        inner = [
            run.inner(xw, self.w1, "w inner", Finish.TANH),
            run.inner(xa, self.a1, "a inner"),
            None if carried is None else run.inner(xv, self.v1, "v inner"),
            run.inner(xg, self.g1, "g inner", Finish.SIGMOID),
        ]
        outer = [self.w2, self.a2, None if carried is None else self.v2, self.g2]
        vectors = [self.w0, self.a0, None if carried is None else self.v0, self.k_k, self.k_a, self.r_k]
        y = run.heads(Kind.HEADS7, self, [r, k, v, carried, *inner], outer, vectors, state.wkv, LN_X_EPS)
        run.linear(self.output, y, run.x, Finish.ADDED)
        return v if carried is None else carried


class ChannelMix(blocks.ChannelMix):
    """The feed-forward half of a block."""

    mixes = ("x_k",)
    widening = 4.0

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.key = Linear(sizes.n_embd, sizes.dim_ffn)
        self.value = Linear(sizes.dim_ffn, sizes.n_embd)

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        return {
            "x_k": 1.0 - at.power(at.height**4),
            "key.weight": at.orthogonal(at.ffn, at.C, 1.0),
            "value.weight": torch.zeros(at.C, at.ffn),
        }

    def forward(self, x: Tensor, carried: Tensor | None, shift: Tensor | None, starts: Starts | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        (xk,) = token_mix(x, shift, starts, self.shares())
        return self.value(relu_squared(self.key(xk)))

    def decode(self, run: Decoding, norm: nn.LayerNorm, state: LayerState) -> None:
        _, xk = run.mixed(self, norm, state.ffn_shift, self.shares)
        run.linear(self.value, run.linear(self.key, xk, "ffn key", Finish.RELU_SQUARED), run.x, Finish.ADDED)


class Block(blocks.Block):
    """A block of RWKV-7; what it carries to the next one is v_first, the values of block 0."""

    time_mix = TimeMix
    channel_mix = ChannelMix
