"""WKV-7, the recurrence of RWKV-7: a generalised delta rule with a matrix state per head.

B batch, T tokens, H heads, N head size (N_v value index = rows, N_k key index = columns of the state), S segments
"""

import itertools

import torch
from torch import Tensor

from src.ops.select import choose
from src.ops.wkv7_cpu import wkv7_cpu
from src.ops.wkv7_naive import wkv7_naive

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence (RWKV-7 "Goose", arXiv 2503.14456, section 4), per batch row and head:

        sa_t = S_{t-1} a_t;   S_t = S_{t-1} diag(d_t) + sa_t b_t^T + v_t k_t^T;   y_t = S_t r_t
        d_t = exp(-exp(-1/2) * sigmoid(w_t)), so w is the raw network output, not a decay.

    r, w, k, v, a, b: (B, T, H, N), one dtype: bfloat16, float32 or float64 (naive only); strides are free.
    state: (B, H, N_v, N_k), the initial state, or None for zeros. Kept in float32 (float64 for float64 inputs).
    starts: None, or int64 (S+1,) with B == 1: row s of the packed tokens is starts[s] : starts[s+1], may be empty,
        and begins from state[s] of an (S, H, N_v, N_k) state.
    backend: "auto", or a name of `select.BACKENDS["wkv7"]`.
    Returns y (B, T, H, N) in r's dtype and the final state, shaped like `state`. Gradients reach all six inputs and
    the initial state, also through the final state. Raises ValueError naming the argument at fault.
    """
    _check_inputs({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b})
    batch, tokens, heads, size = r.shape
    lengths = None if starts is None else segment_lengths(starts, batch, tokens)
    rows = batch if lengths is None else len(lengths)
    state = _initial_state(state, (rows, heads, size, size), r)
    name, _ = choose("wkv7", r.device, r.dtype, tuple(r.shape), backend)
    return RUN[name](r, w, k, v, a, b, state, lengths)


def segment_lengths(starts: Tensor, batch: int, tokens: int) -> list[int]:
    """Lengths of the packed rows, from their cumulative `starts` (S+1,) int64. Raises ValueError."""
    if starts.dtype != torch.int64 or starts.dim() != 1 or starts.numel() < 2:
        raise ValueError(
            f"starts must be int64 of shape (segments + 1,), not {starts.dtype} of shape {tuple(starts.shape)}"
        )
    if batch != 1:
        raise ValueError(f"starts needs packed rows with batch size 1, but the batch size is {batch}")
    edges = starts.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(edges)]
    if edges[0] != 0 or edges[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"starts must rise from 0 to the {tokens} tokens without a step back, not {edges}")
    return lengths


def _check_inputs(inputs: dict[str, Tensor]) -> None:
    """Six tensors of one shape, dtype and device."""
    r = inputs["r"]
    if r.dim() != 4:
        raise ValueError(f"r must have shape (batch, tokens, heads, head size), not {tuple(r.shape)}")
    if r.dtype not in DTYPES:
        raise ValueError(f"r must be bfloat16, float32 or float64, not {r.dtype}")
    for name, x in inputs.items():
        if x.shape != r.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but r has {tuple(r.shape)}")
        if x.dtype != r.dtype:
            raise ValueError(f"{name} is {x.dtype}, but r is {r.dtype}")
        if x.device != r.device:
            raise ValueError(f"{name} is on {x.device}, but r is on {r.device}")


def _initial_state(state: Tensor | None, shape: tuple[int, ...], r: Tensor) -> Tensor:
    """The given state, or zeros, in the dtype of the arithmetic."""
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=r.device)
    if tuple(state.shape) != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}, but these inputs need {shape}")
    if not state.is_floating_point():
        raise ValueError(f"state must be a floating-point tensor, not {state.dtype}")
    if state.device != r.device:
        raise ValueError(f"state is on {state.device}, but r is on {r.device}")
    return state.to(dtype)


RUN = {"cpu": wkv7_cpu, "naive": wkv7_naive}
