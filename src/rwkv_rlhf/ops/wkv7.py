"""WKV-7, the recurrence of RWKV-7: a generalised delta rule with a matrix state per head.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state), S segments
"""

import math

import torch
from torch import Tensor

from rwkv_rlhf.ops.recurrence import recur
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.wkv6 import no_state

DECAY_RATE = math.exp(-0.5)  # log decay lies in (-DECAY_RATE, 0)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    starts: Tensor | Starts | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence (RWKV-7 "Goose", arXiv 2503.14456, section 4), per batch row and head:

        sa_t = S_{t-1} a_t;   S_t = S_{t-1} diag(d_t) + sa_t b_t^T + v_t k_t^T;   y_t = S_t r_t
        d_t = exp(-exp(-1/2) * sigmoid(w_t)), so w is the raw network output, not a decay.

    r, w, k, v, a, b: (B, T, H, N), one dtype: bfloat16, float32 or float64 (naive only); strides are free.
    state: (B, H, N_v, N_k), the initial state, or None for zeros. Kept in float32 (float64 for float64 inputs).
    starts: None, or int64 (S+1,) with B == 1: row s of the packed tokens is starts[s] : starts[s+1], may be empty,
        and begins from state[s] of an (S, H, N_v, N_k) state.
    backend: "auto", or a name of `tables.BACKENDS`.
    Returns y (B, T, H, N) in r's dtype and the final state, shaped like `state`. Gradients reach all six inputs and
    the initial state, also through the final state. Raises ValueError naming the argument at fault.
    """
    tokens = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    return recur("wkv7", scan, tokens, {}, state, no_state, starts, backend)


def scan(inputs: tuple[Tensor, ...], vectors: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as a plain loop over tokens: slow, works in float64, and judges every other backend."""
    r, w, k, v, a, b = inputs
    decay = torch.exp(-DECAY_RATE * torch.sigmoid(w))
    ys = []
    for step in zip(*(x.unbind(1) for x in (r, decay, k, v, a, b)), strict=True):
        r_t, d_t, k_t, v_t, a_t, b_t = step  # each (B, H, N)
        sa = state @ a_t[..., None]  # (B, H, N_v, 1)
        state = state * d_t[..., None, :] + sa * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        ys.append((state @ r_t[..., None])[..., 0])
    return (torch.stack(ys, dim=1) if ys else r), state
