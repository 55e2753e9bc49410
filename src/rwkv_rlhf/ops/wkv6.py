"""WKV-6, the recurrence of RWKV-6 "Finch": linear attention with a decay per token and key channel.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state), S segments
"""

import torch
from torch import Tensor

from rwkv_rlhf.ops.recurrence import recur
from rwkv_rlhf.ops.starts import Starts


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    starts: Tensor | Starts | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-6 recurrence (arXiv 2404.05892, section 4.2), per batch row and head:

        y_t = S_{t-1} r_t + (sum_j r_tj u_j k_tj) v_t;   S_t = S_{t-1} diag(d_t) + v_t k_t^T
        d_t = exp(-exp(w_t)), so w is the raw network output; y reads the state before token t.

    r, k, v, w: (B, T, H, N), one dtype: bfloat16, float32 or float64 (naive only); strides are free.
    u: (H, N), the bonus of the current token, floating-point of any dtype; used in float32 (float64 as above).
    state: (B, H, N_v, N_k), the initial state, or None for zeros. Kept in float32 (float64 for float64 inputs).
    starts: None, or int64 (S+1,) with B == 1: row s of the packed tokens is starts[s] : starts[s+1], may be empty,
        and begins from state[s] of an (S, H, N_v, N_k) state.
    backend: "auto", or a name of `tables.BACKENDS`.
    Returns y (B, T, H, N) in r's dtype and the final state, shaped like `state`. Gradients reach all inputs and the
    initial state, also through the final state. Raises ValueError naming the argument at fault.
    """
    tokens = {"r": r, "k": k, "v": v, "w": w}
    return recur("wkv6", scan, tokens, {"u": u}, state, no_state, starts, backend)


def no_state(r: Tensor) -> Tensor:
    """The state of one row before any token, (H, N_v, N_k), for r (B, T, H, N)."""
    heads, size = r.shape[-2:]
    return torch.zeros(heads, size, size, device=r.device)


def scan(inputs: tuple[Tensor, ...], vectors: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV-6 as a plain loop over tokens: slow, works in float64, and judges every other backend."""
    r, k, v, w = inputs
    return loop(r, k, v, torch.exp(-torch.exp(w)), vectors[0], state)


def loop(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y and the final state for r, k, v, decay: (B, T, H, N); u: (H, N); state: (B, H, N_v, N_k)."""
    ys = []
    for step in zip(*(x.unbind(1) for x in (r, k, v, decay)), strict=True):
        r_t, k_t, v_t, d_t = step  # each (B, H, N)
        ys.append((state @ r_t[..., None])[..., 0] + (r_t * u * k_t).sum(-1, keepdim=True) * v_t)
        state = state * d_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
    return (torch.stack(ys, dim=1) if ys else r), state
