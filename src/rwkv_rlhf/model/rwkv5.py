"""RWKV-5 "Eagle": linear attention with a matrix state per head. x052 is RWKV-5.2; x051 and x050 came before it.

Names, shapes and order of operations follow RWKV-LM 524481d (x052: RWKV-v5/src/model.py; x050, x051: the preview in
RWKV-v4neo/src/model.py), arXiv 2404.05892, section 4.1, and the released models as the `rwkv` package runs them.
Legend: B batch, T tokens, C width, A attention width, H heads, N head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.model import blocks, rwkv4
from rwkv_rlhf.model.blocks import (
    HeadsTimeMix,
    attention_of_heads,
    complement,
    gated_ffn,
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
from rwkv_rlhf.ops.wkv5 import wkv5

MIXES = ("time_mix_k", "time_mix_v", "time_mix_r")


class TimeMix(HeadsTimeMix):
    """The attention half of a block of x050: one decay and one bonus per head, no gate."""

    recurrence = "wkv5"
    mixes: tuple[str, ...] = MIXES
    by_channel = False  # one decay and one bonus for each head, not for each channel of each head
    time_decay: nn.Parameter

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__(sizes, layer)
        self.bonus = sizes.bonus

    def vector_shapes(self, sizes: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
        shape = (sizes.n_head, sizes.head_size) if self.by_channel else (sizes.n_head,)
        return {**dict.fromkeys(self.mixes, (1, 1, sizes.n_embd)), "time_decay": shape, sizes.bonus: shape}

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Raw decay and bonus of the current token, each (H, N)."""
        shape = (self.heads, self.head_size)
        bonus: Tensor = getattr(self, self.bonus)
        if self.bonus == "time_first":  # its logarithm
            bonus = bonus.to(torch.promote_types(bonus.dtype, torch.float32)).exp()
        return self.time_decay.view(self.heads, -1).expand(shape), bonus.view(self.heads, -1).expand(shape)

    def gated(self, y: Tensor, inputs: list[Tensor]) -> Tensor:
        """y (B, T, A) behind the gate that `inputs`, what the mixes after the third gave, open; there is none here."""
        return y

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
        xk, xv, xr, *rest = token_mix(x, shift, starts, complement(stacked(self, self.mixes)))
        r, k, v = self.split(self.receptance(xr)), self.split(self.key(xk)), self.split(self.value(xv))
        y, wkv_state = wkv5(r, k, v, *self.vectors(), wkv_state, starts, backend)
        return self.output(self.gated(normalise_heads(y, self.ln_x), rest)), carried, wkv_state

    def gate_of(self, run: Decoding, inputs: list[Tensor]) -> Tensor | None:
        """The gate behind its function, of `inputs` as `gated` has them; None where there is none."""
        return None

    def decode(
        self, run: Decoding, norm: nn.LayerNorm, first: nn.LayerNorm | None, carried: None, state: LayerState
    ) -> None:
        """As `forward`, for a program."""
        mixed = run.mixed(self, norm, state.att_shift, lambda: complement(stacked(self, self.mixes)), first)
        _, xk, xv, xr, *rest = mixed
        r, k = run.linear(self.receptance, xr, "r"), run.linear(self.key, xk, "k", beside=True)
        v = run.linear(self.value, xv, "v", beside=True)
        gate = self.gate_of(run, rest)
        decay = run.once((id(self), "decay"), lambda: self.vectors()[0].flatten())
        vectors = [decay, run.once((id(self), "bonus"), lambda: self.vectors()[1].flatten())]
        y = run.heads(Kind.HEADS6, self, [r, k, v, None], [None], vectors, state.wkv, self.ln_x.eps, [gate])
        run.linear(self.output, y, run.x, Finish.ADDED)


class GatedTimeMix(TimeMix):
    """x051: the output passes a gate."""

    mixes = (*MIXES, "time_mix_g")

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__(sizes, layer)
        # after ln_x, unlike in x060: resume points know the tensors by their order
        self.gate = Linear(sizes.n_embd, sizes.dim_att)

    def gated(self, y: Tensor, inputs: list[Tensor]) -> Tensor:
        """y * silu(gate(xg))."""
        (xg,) = inputs
        return y * F.silu(self.gate(xg))

    def gate_of(self, run: Decoding, inputs: list[Tensor]) -> Tensor:
        (xg,) = inputs
        return run.linear(self.gate, xg, "gate", Finish.SILU, beside=True)


class ChannelTimeMix(GatedTimeMix):
    """x052: the gate, and a decay and a bonus for each channel of each head."""

    by_channel = True

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        shares = {f"time_mix_{name}": share for name, share in at.own_shares().items()}
        return {**shares, "time_decay": at.slow_decay().view(-1, at.N), **attention_of_heads(at)}


class ChannelMix(rwkv4.ChannelMix):
    """The feed-forward half of a block."""

    widening = 3.5

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        return {f"time_mix_{name}": at.power(at.height) for name in "kr"} | gated_ffn(at, 1.0)


class Block50(blocks.Block):
    """A block of RWKV-5.0."""

    time_mix = TimeMix
    channel_mix = ChannelMix


class Block51(blocks.Block):
    """A block of RWKV-5.1."""

    time_mix = GatedTimeMix
    channel_mix = ChannelMix


class Block52(blocks.Block):
    """A block of RWKV-5.2."""

    time_mix = ChannelTimeMix
    channel_mix = ChannelMix
