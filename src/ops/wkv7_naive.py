"""WKV-7 as a plain loop over tokens: slow, works in float64, and judges every other backend.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state)
"""

import math

import torch
from torch import Tensor

DECAY_RATE = math.exp(-0.5)  # log decay lies in (-DECAY_RATE, 0)


def wkv7_naive(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `wkv7` on checked arguments, differentiated by autograd.

    r, w, k, v, a, b: (B, T, H, N); state: (B, H, N_v, N_k), or one row per segment where `lengths` holds the
    segments' lengths (then B is 1). Arithmetic runs in the state's dtype. Returns y (B, T, H, N) in r's dtype and the
    final state.
    """
    dtype = r.dtype
    decay = torch.exp(-DECAY_RATE * torch.sigmoid(w.to(state.dtype)))
    inputs = tuple(x.to(state.dtype) for x in (r, decay, k, v, a, b))
    if lengths is None:
        y, state = _scan(inputs, state)
        return y.to(dtype), state
    runs, begin = [], 0
    for i, length in enumerate(lengths):
        runs.append(_scan(tuple(x[:, begin : begin + length] for x in inputs), state[i : i + 1]))
        begin += length
    return torch.cat([y for y, _ in runs], dim=1).to(dtype), torch.cat([last for _, last in runs])


def _scan(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over all tokens of `inputs` = r, decay, k, v, a, b, each (B, T, H, N)."""
    ys = []
    for r, decay, k, v, a, b in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (B, H, N)
        sa = state @ a[..., None]  # (B, H, N_v, 1)
        state = state * decay[..., None, :] + sa * b[..., None, :] + v[..., None] * k[..., None, :]
        ys.append((state @ r[..., None])[..., 0])
    return (torch.stack(ys, dim=1) if ys else inputs[0]), state
