"""Plain PyTorch twins of `ops/elementwise.py`: the definition, the judge of the kernels, and the way without them.

Legend: B batch, T tokens, C width, H heads, N head size (C = H * N), S segments of a packed row, M mixes.
Arithmetic is float32 (float64 for float64 activations); a result is rounded once, to the activations' dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.precision import wide_dtype

NORM_EPS = 1e-12  # the smallest norm delta_keys divides by, as F.normalize


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that arithmetic uses: float64 if the first one is float64, else float32."""
    dtype = wide_dtype(tensors[0].dtype)
    return [t.to(dtype) for t in tensors]


def token_mix(
    x: Tensor, last: Tensor | None, mixes: Tensor, starts: Tensor | Starts | None = None
) -> tuple[Tensor, ...]:
    """out_m = x + (shift(x) - x) * mix_m; see `elementwise.token_mix`."""
    wide, wide_mixes = _wide(x, mixes)
    if starts is None:
        head = wide.new_zeros(x.shape[0], x.shape[2]) if last is None else last.to(wide.dtype)
        prev = torch.cat([head[:, None], wide], 1)[:, : x.shape[1]]
    else:
        packed = Starts.of(starts)
        first, filled = packed.first_on(x.device), packed.filled_on(x.device)
        heads = wide.new_zeros(len(filled), x.shape[2]) if last is None else last.to(wide.dtype)[filled]
        prev = F.pad(wide[0], (0, 0, 1, 0))[: x.shape[1]].index_copy(0, first, heads)[None]
    delta = prev - wide
    return tuple((wide + delta * mix).to(x.dtype) for mix in wide_mixes)


def value_gate(v: Tensor, v_first: Tensor, v0: Tensor, v12: Tensor) -> Tensor:
    """v + (v_first - v) * sigmoid(v0 + v12); see `elementwise.value_gate`."""
    wide, first, bias, low = _wide(v, v_first, v0, v12)
    return (wide + (first - wide) * torch.sigmoid(bias + low)).to(v.dtype)


def delta_keys(
    k: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, a12: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """k (1 + (a - 1) k_a), -kk, kk a; see `elementwise.delta_keys`."""
    wide, scale, amount, bias, low = _wide(k, k_k, k_a, a0, a12)
    rate = torch.sigmoid(bias + low)
    kk = F.normalize((wide * scale).unflatten(-1, (heads, -1)), dim=-1, eps=NORM_EPS).flatten(-2)
    replaced = wide * (1 + (rate - 1) * amount)
    return replaced.to(k.dtype), (-kk).to(k.dtype), (kk * rate).to(k.dtype)


def gated_norm(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    g: Tensor,
    eps: float = 64e-5,
) -> Tensor:
    """(GroupNorm_H(y) weight + bias + (sum_head r k r_k) v) g; see `elementwise.gated_norm`."""
    y_, r_, k_, v_, r_k_, weight_, bias_, g_ = _wide(y, r, k, v, r_k, weight, bias, g)
    heads, size = y.shape[-2:]
    normed = F.layer_norm(y_, (size,), eps=eps).flatten(-2) * weight_ + bias_
    bonus = ((r_ * k_).unflatten(-1, (heads, size)) * r_k_).sum(-1, keepdim=True)
    out: Tensor = (normed + (bonus * v_.unflatten(-1, (heads, size))).flatten(-2)) * g_
    return out.to(y.dtype)


def residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and the LayerNorm of that; see `elementwise.residual_norm`."""
    total = x + y
    return total, F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2; see `elementwise.relu_squared`."""
    (wide,) = _wide(torch.relu(x))
    return wide.square().to(x.dtype)


def relu_squared_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of x, from that of `out` = max(x, 0)^2: 2 max(x, 0), which is twice the root of `out`."""
    (wide,) = _wide(out)
    return wide.sqrt().mul_(grad).mul_(2).to(grad.dtype)
