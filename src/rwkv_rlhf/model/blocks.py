"""What the blocks of all versions share: norms, low-rank vectors, the gated channel mixing, the residual skeleton.

Legend: B batch, T tokens, C width, A attention width, H heads, N head size, M mixes, S packed segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.model.position import Position
from rwkv_rlhf.model.program import Decoding
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.model.state import LayerState, carry
from rwkv_rlhf.ops.decode import Finish
from rwkv_rlhf.ops.elementwise import relu_squared, residual_norm, token_mix
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.precision import wide_dtype

# GroupNorm's epsilon for heads of x050 to x070, whatever the head size: the tradition divides the heads by 8 and adds
# 1e-5 to the variance, which is the same as adding 64e-5 without dividing.
LN_X_EPS = 64e-5


def normalise(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the width in the dtype of `x`, whatever the dtype of its weights (float32 masters)."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def normalise_heads(y: Tensor, norm: nn.GroupNorm) -> Tensor:
    """y (B, T, H, N) -> (B, T, A): each head of each token by itself, then weight and bias per channel."""
    heads = F.layer_norm(y, y.shape[-1:], eps=norm.eps).flatten(2)
    return torch.addcmul(norm.bias.to(y.dtype), heads, norm.weight.to(y.dtype))


def low_rank(x: Tensor, down: Tensor, up: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """x (B, T, C) -> up(between(down(x))), both matrices cast to the dtype of `x`."""
    inner = x @ down.to(x.dtype)
    return (inner if between is None else between(inner)) @ up.to(x.dtype)


def stacked(module: nn.Module, names: Sequence[str]) -> Tensor:
    """The parameters of these names, each (1, 1, C), as one (M, C)."""
    return torch.cat([getattr(module, name) for name in names]).squeeze(1)


def complement(keep: Tensor) -> Tensor:
    """1 - keep, in float32 at least: x050 and older name the share of the token itself, `token_mix` that of the last.

    A share of 0.999 subtracted in bfloat16 would leave 0.
    """
    return 1 - keep.to(torch.promote_types(keep.dtype, torch.float32))


class TimeMix(nn.Module):
    """The attention half of a block. A version says which small tensors and matrices it has, and runs them.

    `forward(x, carried, shift, wkv_state, starts, backend)` gives (output (B, T, C), carried, new wkv state). `carried`
    is what a block hands to the next one beside x: v_first in x070, `Carried` of model/rwkv7a.py in x070a, None in the
    others.
    """

    matrices: tuple[str, ...] = ("receptance", "key", "value", "output")
    recurrence: str  # its name in ops/backends.py
    receptance: Linear
    key: Linear
    value: Linear
    output: Linear

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        for name, shape in self.vector_shapes(sizes, layer).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        C, A = sizes.n_embd, sizes.dim_att
        for name in self.matrices:
            setattr(self, name, Linear(A, C) if name == "output" else Linear(C, A))

    def vector_shapes(self, sizes: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the small tensors of block `layer`, by name."""
        raise NotImplementedError

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        """The tensors of a new block by name, float32. Raises NotImplementedError for versions that nobody makes."""
        raise NotImplementedError

    def learnt_shape(self) -> tuple[int, ...]:
        """Shape of the learnt initial state `time_state`; all zeros are no state."""
        raise NotImplementedError

    def first_state(self, learnt: Tensor | None) -> Tensor:
        """The recurrence's state of one sequence before any token, float32, from `time_state` if there is one."""
        raise NotImplementedError

    def decode(
        self, run: Decoding, norm: nn.LayerNorm, first: nn.LayerNorm | None, carried: Any, state: LayerState
    ) -> Any:
        """`forward` of one token of each row, behind `first` (ln0) and `norm`, as operations that add the output to
        run.x and change the state in place; what is carried comes back."""
        raise NotImplementedError


class HeadsTimeMix(TimeMix):
    """Attention with a matrix state (N_value, N_key) for each head and a norm over the outputs of each: x050 on."""

    ln_x: nn.GroupNorm

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__(sizes, layer)
        self.heads, self.head_size = sizes.n_head, sizes.head_size
        self.ln_x = nn.GroupNorm(self.heads, sizes.dim_att, eps=LN_X_EPS)

    def learnt_shape(self) -> tuple[int, ...]:
        return (self.heads, self.head_size, self.head_size)

    def first_state(self, learnt: Tensor | None) -> Tensor:
        return torch.zeros(self.learnt_shape(), device=self.ln_x.weight.device) if learnt is None else learnt

    def split(self, x: Tensor) -> Tensor:
        """x (B, T, A) -> (B, T, H, N)."""
        return x.view(*x.shape[:2], self.heads, self.head_size)


def attention_of_heads(at: Position) -> dict[str, Tensor]:
    """Initial values that x052 and x060 have in common."""
    gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "output": 0.0, "gate": 0.1}
    bonus = at.depth * (1 - at.slope()) + 0.1 * at.zigzag()
    matrices = {f"{name}.weight": at.orthogonal(at.C, at.C, gain) for name, gain in gains.items()}
    return {"time_faaaa": bonus.view(-1, at.N), **matrices, **at.norm()}


class ChannelMix(nn.Module):
    """The feed-forward half of a block: `mixes` names the mixing vectors, one for each input.

    `forward(x, carried, shift, starts)` gives the output (B, T, C); `carried` as the attention half has left it.
    `widening`: its width as a multiple of C in new models, before it is rounded down to a multiple of 32.
    """

    mixes: tuple[str, ...]
    widening: float

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        for name in self.mixes:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, sizes.n_embd)))

    @staticmethod
    def initial_values(at: Position) -> dict[str, Tensor]:
        """The tensors of a new block by name, float32."""
        raise NotImplementedError

    def shares(self) -> Tensor:
        """How much of the previous token goes into each input: (M, C)."""
        return stacked(self, self.mixes)

    def decode(self, run: Decoding, norm: nn.LayerNorm, state: LayerState) -> None:
        """`forward` of one token of each row, behind `norm`, as operations that add the output to run.x."""
        raise NotImplementedError


class GatedChannelMix(ChannelMix):
    """Up to x060: sigmoid(receptance(xr)) * value(relu(key(xk))^2), with the mixing vectors of key and receptance."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.key = Linear(sizes.n_embd, sizes.dim_ffn)
        self.receptance = Linear(sizes.n_embd, sizes.n_embd)
        self.value = Linear(sizes.dim_ffn, sizes.n_embd)

    def forward(self, x: Tensor, carried: None, shift: Tensor | None, starts: Starts | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        xk, xr = token_mix(x, shift, starts, self.shares())
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_squared(self.key(xk)))

    def decode(self, run: Decoding, norm: nn.LayerNorm, state: LayerState) -> None:
        _, xk, xr = run.mixed(self, norm, state.ffn_shift, self.shares)
        inner = run.linear(self.key, xk, "ffn key", Finish.RELU_SQUARED)
        gate = run.linear(self.receptance, xr, "ffn gate", Finish.SIGMOID, beside=True)
        run.linear(self.value, inner, run.x, Finish.ADDED_GATED, gate)


def gated_ffn(at: Position, key_gain: float) -> dict[str, Tensor]:
    """Initial values of the matrices of a `GatedChannelMix`."""
    return {
        "key.weight": at.orthogonal(at.ffn, at.C, key_gain),
        "receptance.weight": torch.zeros(at.C, at.C),
        "value.weight": torch.zeros(at.C, at.ffn),
    }


class Block(nn.Module):
    """ln1 -> time mixing -> ln2 -> channel mixing, each added to the residual stream. Block 0 owns ln0.

    A version subclasses this and names its halves. `dropout`: of the whole stream after each sum, as RWKV-LM has it.
    """

    time_mix: type[TimeMix]
    channel_mix: type[ChannelMix]
    decodes = True  # whether its halves have `decode`
    att: TimeMix
    ffn: ChannelMix

    @staticmethod
    def at_first(tokens: Tensor) -> Any:
        """What block 0 finds as `carried`. tokens (B, T) int64."""
        return None

    def begun(self, x: Tensor, carried: Any) -> Any:
        """`carried` in block 0, when x (B, T, C) has passed ln0."""
        return carried

    def __init__(self, sizes: Sizes, layer: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(sizes.n_embd)
        self.ln1 = nn.LayerNorm(sizes.n_embd)
        self.ln2 = nn.LayerNorm(sizes.n_embd)
        self.att = self.time_mix(sizes, layer)
        self.ffn = self.channel_mix(sizes)
        self.states = sizes.states
        for name in self.states:
            half, _, leaf = name.partition(".")
            shape = self.att.learnt_shape() if leaf == "time_state" else (sizes.n_embd,)
            getattr(self, half).register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def initial_state(self, rows: int, dtype: torch.dtype) -> LayerState:
        """What `rows` sequences remember before any token, learnt or nothing; shifts in `dtype`."""
        device = self.ln1.weight.device
        wkv = self.att.first_state(getattr(self.att, "time_state", None)).to(device, wide_dtype(dtype))
        nothing = torch.zeros(self.ln1.normalized_shape, device=device)
        att_shift = getattr(self.att, "shift_state", nothing).to(device, dtype).expand(rows, -1)
        ffn_shift = getattr(self.ffn, "shift_state", nothing).to(device, dtype).expand(rows, -1)
        return LayerState(att_shift, wkv.expand(rows, *wkv.shape), ffn_shift)

    def forward(
        self,
        x: Tensor,
        carried: Any,
        state: LayerState | None,
        starts: Starts | None,
        backend: str,
        keep_state: bool = True,
    ) -> tuple[Tensor, Any, LayerState | None]:
        """x (B, T, C), `carried` from the block before (`at_first` in block 0) -> (x, carried, new state if kept).

        ln0 is applied here, so that whoever shards the model finds all that a block needs in the block's own call.
        """
        if self.first:
            x = normalise(x, self.ln0)
            carried = self.begun(x, carried)
        if state is None and self.states:
            state = self.initial_state(len(x) if starts is None else len(starts) - 1, x.dtype)
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        att_in = normalise(x, self.ln1)
        y, carried, wkv = self.att(att_in, carried, att_shift, wkv, starts, backend)
        if self.dropout and self.training:
            x = F.dropout(x + y, self.dropout)
            ffn_in = normalise(x, self.ln2)
        else:
            x, ffn_in = residual_norm(x, y, self.ln2.weight, self.ln2.bias, self.ln2.eps)
        x = F.dropout(x + self.ffn(ffn_in, carried, ffn_shift, starts), self.dropout, self.training)
        if not keep_state:
            return x, carried, None
        return x, carried, LayerState(carry(att_in, att_shift, starts), wkv, carry(ffn_in, ffn_shift, starts))
