"""RWKV-4 (x040): each channel keeps a weighted mean of its values.

Names, shapes and order of operations follow RWKV-LM (RWKV-v4neo/src/model.py, 524481d) and arXiv 2305.13048, section 3.
Legend: B batch, T tokens, C width, A attention width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_rlhf.model import blocks
from rwkv_rlhf.model.blocks import GatedChannelMix, complement, gated_ffn, stacked
from rwkv_rlhf.model.position import Position
from rwkv_rlhf.model.program import Decoding
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.model.state import LayerState
from rwkv_rlhf.ops.decode import Finish, Kind
from rwkv_rlhf.ops.elementwise import token_mix
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.wkv4 import no_sums, wkv4

MIXES = ("time_mix_k", "time_mix_v", "time_mix_r")


class TimeMix(blocks.TimeMix):
    """The attention half of a block."""

    matrices = ("key", "value", "receptance", "output")
    recurrence = "wkv4"
    time_decay: nn.Parameter
    time_first: nn.Parameter

    def vector_shapes(self, sizes: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
        A = sizes.dim_att
        return {"time_decay": (A,), "time_first": (A,), **dict.fromkeys(MIXES, (1, 1, sizes.n_embd))}

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        C, shares = at.C, at.own_shares()
        return {
            "time_decay": -5 + 8 * at.slope() ** (0.7 + 1.3 * at.depth),
            "time_first": math.log(0.3) + 0.5 * at.zigzag(),
            **{f"time_mix_{name}": shares[name] for name in "kvr"},
            "key.weight": torch.zeros(C, C),
            "value.weight": at.orthogonal(C, C, 1.0),
            "receptance.weight": torch.zeros(C, C),
            "output.weight": torch.zeros(C, C),
        }

    def learnt_shape(self) -> tuple[int, ...]:
        """(A, 2), the numerator p and the denominator q, which counts as 0 where negative."""
        return (len(self.time_decay), 2)

    def first_state(self, learnt: Tensor | None) -> Tensor:
        """The sums of one sequence before any token, (A, 3)."""
        if learnt is None:
            return no_sums(len(self.time_decay), self.time_decay.device)
        p, q = learnt.unbind(-1)
        return torch.stack([p, q.clamp(min=0), torch.zeros_like(p)], -1)

    def forward(
        self,
        x: Tensor,
        carried: None,
        shift: Tensor | None,
        wkv_state: Tensor | None,
        starts: Starts | None,
        backend: str,
    ) -> tuple[Tensor, None, Tensor]:
        """x (B, T, C) -> (output (B, T, C), None, wkv state (B or S, A, 3))."""
        xk, xv, xr = token_mix(x, shift, starts, complement(stacked(self, MIXES)))
        k, v = self.key(xk), self.value(xv)  # (B, T, A)
        y, wkv_state = wkv4(k, v, self.time_decay, self.time_first, wkv_state, starts, backend)
        return self.output(torch.sigmoid(self.receptance(xr)) * y), carried, wkv_state

    def decode(
        self, run: Decoding, norm: nn.LayerNorm, first: nn.LayerNorm | None, carried: None, state: LayerState
    ) -> None:
        """As `forward`, for a program."""
        mixed = run.mixed(self, norm, state.att_shift, lambda: complement(stacked(self, MIXES)), first)
        _, xk, xv, xr = mixed
        k, v = run.linear(self.key, xk, "k"), run.linear(self.value, xv, "v", beside=True)
        r = run.linear(self.receptance, xr, "r", Finish.SIGMOID, beside=True)
        y = run.buffer("heads", *k.shape)
        vectors = [run.vector(self.time_decay), run.vector(self.time_first)]
        run.operation(Kind.CHANNELS4, k.shape, [k, v, r, *vectors, state.wkv, y])
        run.linear(self.output, y, run.x, Finish.ADDED)


class ChannelMix(GatedChannelMix):
    """The feed-forward half of a block, of RWKV-5 too but for its width and first values."""

    mixes = ("time_mix_k", "time_mix_r")
    widening = 4.0

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        shares = {f"time_mix_{name}": at.power(at.height) for name in "kr"}
        return shares | gated_ffn(at, math.sqrt(max(1.0, at.ffn / at.C)))

    def shares(self) -> Tensor:
        """How much of the previous token goes into each input: (2, C)."""
        return complement(super().shares())


class Block(blocks.Block):
    """A block of RWKV-4."""

    time_mix = TimeMix
    channel_mix = ChannelMix
