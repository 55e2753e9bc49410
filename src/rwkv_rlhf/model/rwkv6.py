"""RWKV-6 "Finch" (x060): linear attention whose decay and token shift depend on the data.

Names, shapes and order of operations follow RWKV-LM (RWKV-v5/src/model.py, 524481d) and arXiv 2404.05892, section 4.2.
Legend: B batch, T tokens, C width, A attention width, H heads, N head size, D inner width of the mixes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.model import blocks
from rwkv_rlhf.model.blocks import (
    GatedChannelMix,
    HeadsTimeMix,
    attention_of_heads,
    gated_ffn,
    low_rank,
    normalise_heads,
    stacked,
)
from rwkv_rlhf.model.position import Position
from rwkv_rlhf.model.program import Decoding
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.model.state import LayerState
from rwkv_rlhf.ops.decode import Finish, Kind
from rwkv_rlhf.ops.elementwise import token_mix
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.wkv6 import wkv6

MIXES = ("time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g")


class TimeMix(HeadsTimeMix):
    """The attention half of a block."""

    matrices = (*HeadsTimeMix.matrices, "gate")
    recurrence = "wkv6"
    gate: Linear
    time_maa_x: nn.Parameter
    time_maa_w1: nn.Parameter
    time_maa_w2: nn.Parameter
    time_decay: nn.Parameter
    time_decay_w1: nn.Parameter
    time_decay_w2: nn.Parameter
    time_faaaa: nn.Parameter

    def vector_shapes(self, sizes: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
        C, A, D, decay = sizes.n_embd, sizes.dim_att, sizes.low_rank["mix"], sizes.low_rank["decay"]
        return {
            **dict.fromkeys(("time_maa_x", *MIXES), (1, 1, C)),
            "time_maa_w1": (C, len(MIXES) * D),
            "time_maa_w2": (len(MIXES), D, C),
            "time_decay": (1, 1, A),
            "time_decay_w1": (C, decay),
            "time_decay_w2": (decay, A),
            "time_faaaa": (sizes.n_head, sizes.head_size),
        }

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        C, D, decay = at.C, at.low_rank.get("mix", 32), at.low_rank.get("decay", 64)
        shares = {"x": at.power(at.height), "w": at.power(at.height), **at.own_shares()}
        return {
            **{f"time_maa_{name}": 1.0 - share for name, share in shares.items()},
            "time_maa_w1": torch.zeros(C, len(MIXES) * D),
            "time_maa_w2": at.uniform(len(MIXES), D, C),
            "time_decay": at.slow_decay().view(1, 1, C),
            "time_decay_w1": torch.zeros(C, decay),
            "time_decay_w2": at.uniform(decay, C),
            **attention_of_heads(at),
        }

    def mixed(self, x: Tensor, shift: Tensor | None, starts: Starts | None) -> tuple[Tensor, ...]:
        """x (B, T, C) -> inputs of w, k, v, r, g: the share of the previous token is itself computed from a mix."""
        B, T, C = x.shape
        first = self.time_maa_x.view(1, C)
        mix, previous = token_mix(x, shift, starts, torch.cat([first, torch.ones_like(first)]))
        inner = torch.tanh(mix @ self.time_maa_w1.to(x.dtype)).view(B * T, len(MIXES), -1).transpose(0, 1)
        always = stacked(self, MIXES).to(x.dtype)[:, None]  # (5, 1, C)
        shares = torch.baddbmm(always, inner, self.time_maa_w2.to(x.dtype)).view(-1, B, T, C)
        return torch.addcmul(x, previous - x, shares).unbind()

    def forward(
        self,
        x: Tensor,
        carried: None,
        shift: Tensor | None,
        wkv_state: Tensor | None,
        starts: Starts | None,
        backend: str,
    ) -> tuple[Tensor, None, Tensor]:
        """x (B, T, C) -> (output (B, T, C), None, wkv state (B or S, H, N, N))."""
        xw, xk, xv, xr, xg = self.mixed(x, shift, starts)
        w = self.time_decay.to(x.dtype) + low_rank(xw, self.time_decay_w1, self.time_decay_w2, torch.tanh)
        r, k, v = self.split(self.receptance(xr)), self.split(self.key(xk)), self.split(self.value(xv))
        y, wkv_state = wkv6(r, k, v, self.split(w), self.time_faaaa, wkv_state, starts, backend)
        y = normalise_heads(y, self.ln_x) * F.silu(self.gate(xg))
        return self.output(y), carried, wkv_state

    def decode(
        self, run: Decoding, norm: nn.LayerNorm, first: nn.LayerNorm | None, carried: None, state: LayerState
    ) -> None:
        """As `forward`, for a program."""
        width, count = run.x.shape[1], len(MIXES)
        difference = run.buffer("difference", run.rows, width)
        x, mix = run.mixed(self, norm, state.att_shift, lambda: self.time_maa_x.view(1, -1), first, difference)
        inner = run.inner(mix, self.time_maa_w1, "mix inner", Finish.TANH, beside=False)
        shares = run.buffer("shares", count, run.rows, width)
        run.low_rank(inner, run.matrix(self.time_maa_w2), shares)
        always = run.once((id(self), MIXES), lambda: stacked(self, MIXES))
        run.operation(Kind.SHARES6, (run.rows, width, count), [shares, always, x, difference])
        xw, xk, xv, xr, xg = shares
        r, k = run.linear(self.receptance, xr, "r"), run.linear(self.key, xk, "k", beside=True)
        v = run.linear(self.value, xv, "v", beside=True)
        gate = run.linear(self.gate, xg, "gate", Finish.SILU, beside=True)
        w = run.inner(xw, self.time_decay_w1, "w inner", Finish.TANH)
        vectors = [self.time_decay, self.time_faaaa]
        eps = self.ln_x.eps
        y = run.heads(Kind.HEADS6, self, [r, k, v, w], [self.time_decay_w2], vectors, state.wkv, eps, [gate])
        run.linear(self.output, y, run.x, Finish.ADDED)


class ChannelMix(GatedChannelMix):
    """The feed-forward half of a block."""

    mixes = ("time_maa_k", "time_maa_r")
    widening = 3.5

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        return {f"time_maa_{name}": 1.0 - at.power(at.height**3) for name in "kr"} | gated_ffn(at, 1.0)


class Block(blocks.Block):
    """A block of RWKV-6."""

    time_mix = TimeMix
    channel_mix = ChannelMix
