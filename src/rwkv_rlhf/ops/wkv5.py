"""WKV-5.2, the recurrence of RWKV-5 "Eagle": WKV-6 with the same decay at every token.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state), S segments
"""

import torch
from torch import Tensor

from rwkv_rlhf.ops.recurrence import recur
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.wkv6 import loop, no_state


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    starts: Tensor | Starts | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-5.2 recurrence (arXiv 2404.05892, section 4.1): `wkv6` with one decay for all tokens.

    As `wkv6`, except for w: (H, N) raw decay, floating-point of any dtype, d = exp(-exp(w)) in float32 (or float64).
    """
    tokens = {"r": r, "k": k, "v": v}
    return recur("wkv5", scan, tokens, {"w": w, "u": u}, state, no_state, starts, backend)


def scan(inputs: tuple[Tensor, ...], vectors: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as a plain loop over tokens: slow, works in float64, and judges every other backend."""
    (r, k, v), (w, u) = inputs, vectors
    return loop(r, k, v, torch.exp(-torch.exp(w)).expand(r.shape), u, state)
