"""WKV-4, the recurrence of RWKV-4: a weighted mean of all values so far, each channel on its own.

B batch, T tokens, C channels, S segments
"""

import torch
from torch import Tensor

from rwkv_rlhf.ops.recurrence import recur
from rwkv_rlhf.ops.starts import Starts

NOTHING = -1e38  # logarithm of the scale of sums that hold nothing yet


def wkv4(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    starts: Tensor | Starts | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-4 recurrence (arXiv 2305.13048, section 3.2), per batch row and channel:

        y_t = (p_{t-1} + e^{u + k_t} v_t) / (q_{t-1} + e^{u + k_t})
        p_t = e^d p_{t-1} + e^{k_t} v_t;   q_t = e^d q_{t-1} + e^{k_t};   d = -exp(w), so w is the raw parameter.

    k, v: (B, T, C), one dtype: bfloat16, float32 or float64 (naive only); strides are free.
    w, u: (C,), floating-point of any dtype; used in float32 (float64 for float64 inputs).
    state: (B, C, 3), or None for the empty one (0, 0, -1e38): aa, bb, pp with p = aa e^pp and q = bb e^pp. Kept in
        float32 (float64 as above). Gradients are those of p and q: pp counts as a scale that could be any other.
    starts: None, or int64 (S+1,) with B == 1: row s of the packed tokens is starts[s] : starts[s+1], may be empty,
        and begins from state[s] of an (S, C, 3) state.
    backend: "auto", or a name of `tables.BACKENDS`.
    Returns y (B, T, C) in k's dtype and the final state, shaped like `state`. Gradients reach all inputs and the
    initial state, also through the final state. Raises ValueError naming the argument at fault.
    """
    return recur("wkv4", scan, {"k": k, "v": v}, {"w": w, "u": u}, state, _empty, starts, backend)


def _empty(k: Tensor) -> Tensor:
    """The state of one row before any token, for k (B, T, C)."""
    return no_sums(k.shape[-1], k.device)


def no_sums(channels: int, device: torch.device) -> Tensor:
    """The state of one row before any token, (C, 3) float32."""
    sums = torch.zeros(3, device=device)
    sums[2].fill_(NOTHING)  # a kernel; a number that is assigned would be copied, and a GPU waited for
    return sums.expand(channels, 3)


def scan(inputs: tuple[Tensor, ...], vectors: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as a plain loop over tokens: slow, works in float64, and judges every other backend."""
    w, u = vectors
    d = -torch.exp(w)
    aa, bb, pp = state.unbind(-1)  # each (B, C)
    ys = []
    for k, v in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (B, C)
        top = torch.maximum(pp, u + k).detach()  # a scale, which cancels: no gradient goes through it
        old, new = torch.exp(pp - top), torch.exp(u + k - top)
        ys.append((aa * old + new * v) / (bb * old + new))
        top = torch.maximum(pp + d, k).detach()
        old, new = torch.exp(pp + d - top), torch.exp(k - top)
        aa, bb, pp = aa * old + new * v, bb * old + new, top
    return (torch.stack(ys, dim=1) if ys else inputs[0]), torch.stack([aa, bb, pp], dim=-1)
