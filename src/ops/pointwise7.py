"""Element-wise groups of RWKV-7 ("Goose", arXiv 2503.14456, section 4), each one differentiable function.

Legend: B batch, T tokens, C width, H heads, N head size (C = H * N), S segments of a packed row, M mixes.
Activations are bfloat16, float32 or (naive) float64; small per-channel vectors may be float32 masters. Arithmetic is
float32 inside (float64 for float64 activations) and the result is rounded once to the activations' dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # the smallest norm delta_keys divides by, as F.normalize


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that arithmetic uses: float64 if the first one is float64, else float32."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in tensors]


def _check_mix(x: Tensor, last: Tensor | None, starts: Tensor | None, mixes: Tensor) -> None:
    if x.dim() != 3 or mixes.dim() != 2 or mixes.shape[1] != x.shape[2]:
        raise ValueError(f"token_mix: x must be (B,T,C) and mixes (M,C), got {tuple(x.shape)} and {tuple(mixes.shape)}")
    rows = x.shape[0]
    if starts is not None:
        if rows != 1:
            raise ValueError(f"token_mix: segment starts need B = 1, got B = {rows}")
        bounds = starts.tolist()
        if starts.dim() != 1 or bounds[0] != 0 or bounds[-1] != x.shape[1] or bounds != sorted(bounds):
            raise ValueError(f"token_mix: starts must rise from 0 to T = {x.shape[1]}, got {bounds}")
        rows = len(bounds) - 1
    if last is not None and last.shape != (rows, x.shape[2]):
        raise ValueError(f"token_mix: last must be {(rows, x.shape[2])}, got {tuple(last.shape)}")


def token_mix_naive(x: Tensor, last: Tensor | None, starts: Tensor | None, mixes: Tensor) -> tuple[Tensor, ...]:
    """Plain PyTorch twin of `token_mix`."""
    wide, wide_mixes = _wide(x, mixes)
    if starts is None:
        head = wide.new_zeros(x.shape[0], x.shape[2]) if last is None else last.to(wide.dtype)
        prev = torch.cat([head[:, None], wide], 1)[:, : x.shape[1]]
    else:
        starts = starts.to(x.device)
        filled = (starts[1:] > starts[:-1]).nonzero()[:, 0]
        heads = wide.new_zeros(len(filled), x.shape[2]) if last is None else last.to(wide.dtype)[filled]
        prev = F.pad(wide[0], (0, 0, 1, 0))[: x.shape[1]].index_copy(0, starts[filled], heads)[None]
    delta = prev - wide
    return tuple((wide + delta * mix).to(x.dtype) for mix in wide_mixes)


def token_mix(
    x: Tensor, last: Tensor | None, starts: Tensor | None, mixes: Tensor, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Interpolate every token with its predecessor: out_m = x + (shift(x) - x) * mix_m.

    x (B,T,C); mixes (M,C). The predecessor of a row's first token is `last` (B,C), or zero if `last` is None.
    With `starts` (S+1,) int64 (cumulative lengths, B = 1) every segment is a row of its own and `last` is (S,C);
    empty segments are legal and their row of `last` is unused. Returns M tensors (B,T,C) in x's dtype. Gradients for
    x, last and mixes. Raises ValueError for shapes that do not fit.
    """
    _check_mix(x, last, starts, mixes)
    return token_mix_naive(x, last, starts, mixes)


def value_gate_naive(v: Tensor, v_first: Tensor, v0: Tensor, v12: Tensor) -> Tensor:
    """Plain PyTorch twin of `value_gate`."""
    wide, first, bias, low = _wide(v, v_first, v0, v12)
    return (wide + (first - wide) * torch.sigmoid(bias + low)).to(v.dtype)


def value_gate(v: Tensor, v_first: Tensor, v0: Tensor, v12: Tensor, backend: str = "auto") -> Tensor:
    """Mix a layer's values with layer 0's: v + (v_first - v) * sigmoid(v0 + v12).

    v, v_first, v12 (B,T,C); v0 (C,). Returns (B,T,C) in v's dtype.
    """
    return value_gate_naive(v, v_first, v0, v12)


def delta_keys_naive(
    k: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, a12: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch twin of `delta_keys`."""
    wide, scale, amount, bias, low = _wide(k, k_k, k_a, a0, a12)
    rate = torch.sigmoid(bias + low)
    kk = F.normalize((wide * scale).unflatten(-1, (heads, -1)), dim=-1, eps=NORM_EPS).flatten(-2)
    replaced = wide * (1 + (rate - 1) * amount)
    return replaced.to(k.dtype), (-kk).to(k.dtype), (kk * rate).to(k.dtype)


def delta_keys(
    k: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, a12: Tensor, heads: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of the delta rule: with a = sigmoid(a0 + a12) and kk = k * k_k of unit length in every head,
    returns k * (1 + (a - 1) * k_a), -kk and kk * a, each (B,T,C) in k's dtype.

    k, a12 (B,T,C); k_k, k_a, a0 (C,); `heads` divides C. A norm below 1e-12 counts as 1e-12.
    """
    return delta_keys_naive(k, k_k, k_a, a0, a12, heads)


def gated_norm_naive(
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
    """Plain PyTorch twin of `gated_norm`."""
    y_, r_, k_, v_, r_k_, weight_, bias_, g_ = _wide(y, r, k, v, r_k, weight, bias, g)
    heads, size = y.shape[-2:]
    normed = F.layer_norm(y_, (size,), eps=eps).flatten(-2) * weight_ + bias_
    bonus = ((r_ * k_).unflatten(-1, (heads, size)) * r_k_).sum(-1, keepdim=True)
    return ((normed + (bonus * v_.unflatten(-1, (heads, size))).flatten(-2)) * g_).to(y.dtype)


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
    backend: str = "auto",
) -> Tensor:
    """What follows the recurrence: (GroupNorm_H(y) * weight + bias + (sum over the head of r * k * r_k) * v) * g.

    y (B,T,H,N); r, k, v, g (B,T,C); r_k (H,N); weight, bias (C,); eps is added to the variance. Returns (B,T,C) in
    y's dtype.
    """
    return gated_norm_naive(y, r, k, v, r_k, weight, bias, g, eps)


def relu_squared_naive(x: Tensor) -> Tensor:
    """Plain PyTorch twin of `relu_squared`."""
    (wide,) = _wide(x)
    return torch.relu(wide).square().to(x.dtype)


def relu_squared(x: Tensor, backend: str = "auto") -> Tensor:
    """max(x, 0)^2 of any shape, in x's dtype."""
    return relu_squared_naive(x)
