"""RWKV-7a (x070a): RWKV-7 with DeepEmbed, a small matrix for each token of the vocabulary in each channel mixing.

Of token t a table holds R x R numbers, R = 32 in released files; with what a matrix makes of the token's embedding
they are M_t, and the hidden channels are multiplied by ((x s1) M_t) s2 + s0. Names, shapes and order of operations
follow the `rwkv` package 0.8.32 with RWKV_DE_VERSION=1 and RWKV-LM's RWKV-v7/rwkv_v7a_demo.py.
Legend: B batch, T tokens, C width, F inner width, R rank of DeepEmbed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.linear import Linear, TokenTable
from rwkv_rlhf.model import rwkv7
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.ops.elementwise import relu_squared, token_mix
from rwkv_rlhf.ops.starts import Starts


class Carried(NamedTuple):
    """What a block hands to the next one beside x. Before block 0 there are the tokens alone."""

    tokens: Tensor  # (B, T) int64
    embedded: Tensor | None = None  # (B, T, C), behind ln0
    v_first: Tensor | None = None  # (B, T, A)


class TimeMix(rwkv7.TimeMix):
    """The attention half: that of RWKV-7."""

    def forward(  # type: ignore[override]  # what is carried is more than v_first
        self,
        x: Tensor,
        carried: Carried,
        shift: Tensor | None,
        wkv_state: Tensor | None,
        starts: Starts | None,
        backend: str,
    ) -> tuple[Tensor, Carried, Tensor]:
        """x (B, T, C) -> (output (B, T, C), carried with v_first, wkv state (B or S, H, N, N))."""
        y, v_first, wkv_state = super().forward(x, carried.v_first, shift, wkv_state, starts, backend)
        return y, carried._replace(v_first=v_first), wkv_state


class ChannelMix(rwkv7.ChannelMix):
    """The feed-forward half of a block: that of RWKV-7, its hidden channels scaled by token and input."""

    s0: nn.Parameter
    s1: nn.Parameter
    s2: nn.Parameter

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        rank = sizes.low_rank["deep"]
        self.s_emb = TokenTable(sizes.vocab_size, rank * rank)
        self.s_emb_x = Linear(sizes.n_embd, rank * rank)
        shapes = {"s0": (1, 1, sizes.dim_ffn), "s1": (sizes.n_embd, rank), "s2": (rank, sizes.dim_ffn)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(  # type: ignore[override]
        self, x: Tensor, carried: Carried, shift: Tensor | None, starts: Starts | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        assert carried.embedded is not None
        (xk,) = token_mix(x, shift, starts, self.shares())
        rank = self.s1.shape[1]
        of_token = self.s_emb(carried.tokens, x.dtype) + self.s_emb_x(carried.embedded)  # (B, T, R * R)
        inner = (x @ self.s1.to(x.dtype)).unsqueeze(-2) @ of_token.unflatten(-1, (rank, rank))  # (B, T, 1, R)
        scale = inner.squeeze(-2) @ self.s2.to(x.dtype) + self.s0.to(x.dtype)  # (B, T, F)
        return self.value(relu_squared(self.key(xk)) * scale)


class Block(rwkv7.Block):
    """A block of RWKV-7a."""

    time_mix = TimeMix
    channel_mix = ChannelMix
    decodes = False

    @staticmethod
    def at_first(tokens: Tensor) -> Carried:
        return Carried(tokens)

    def begun(self, x: Tensor, carried: Carried) -> Carried:
        return carried._replace(embedded=x)
