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
from rwkv_rlhf.model.blocks import LN_X_EPS, GatedChannelMix, low_rank, normalise_heads, stacked
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.ops.elementwise import token_mix
from rwkv_rlhf.ops.wkv6 import wkv6

MIXES = ("time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g")


class TimeMix(nn.Module):
    """The attention half of a block."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        C, A, N, rank = sizes.n_embd, sizes.dim_att, sizes.head_size, sizes.low_rank
        self.head_size, self.heads = N, A // N
        for name in ("time_maa_x", *MIXES):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, len(MIXES) * rank["mix"]))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(MIXES), rank["mix"], C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, rank["decay"]))
        self.time_decay_w2 = nn.Parameter(torch.empty(rank["decay"], A))
        self.time_faaaa = nn.Parameter(torch.empty(self.heads, N))
        self.receptance = Linear(C, A)
        self.key = Linear(C, A)
        self.value = Linear(C, A)
        self.output = Linear(A, C)
        self.gate = Linear(C, A)
        self.ln_x = nn.GroupNorm(self.heads, A, eps=LN_X_EPS)

    def mixed(self, x: Tensor, shift: Tensor | None, starts: Tensor | None) -> tuple[Tensor, ...]:
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
        starts: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, None, Tensor]:
        """x (B, T, C) -> (output (B, T, C), None, wkv state (B or S, H, N, N))."""
        B, T, _ = x.shape
        xw, xk, xv, xr, xg = self.mixed(x, shift, starts)
        w = self.time_decay.to(x.dtype) + low_rank(xw, self.time_decay_w1, self.time_decay_w2, torch.tanh)
        inputs = (self.receptance(xr), self.key(xk), self.value(xv), w)
        r, k, v, w = (t.view(B, T, self.heads, self.head_size) for t in inputs)
        y, wkv_state = wkv6(r, k, v, w, self.time_faaaa, wkv_state, starts, backend)
        y = normalise_heads(y, self.ln_x) * F.silu(self.gate(xg))
        return self.output(y), carried, wkv_state


class ChannelMix(GatedChannelMix):
    """The feed-forward half of a block."""

    mixes = ("time_maa_k", "time_maa_r")


class Block(blocks.Block):
    """A block of RWKV-6."""

    time_mix = TimeMix
    channel_mix = ChannelMix
