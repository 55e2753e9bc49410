"""What the recurrences share: checks of their arguments, packed rows, and the way to a backend.

B batch, T tokens, H heads, N head size, S segments
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.ops.backends import BACKENDS, choose, kernel
from rwkv_rlhf.ops.starts import Starts, even_starts
from rwkv_rlhf.precision import wide_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# One pass over all tokens: (per-token inputs, vectors, state) -> (y, final state), all in the state's dtype.
Scan = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor]]


def recur(
    op: str,
    scan: Scan,
    tokens: dict[str, Tensor],
    vectors: dict[str, Tensor],
    state: Tensor | None,
    empty: Callable[[Tensor], Tensor],
    starts: Tensor | Starts | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of the recurrence `op` and run it on the backend that `backends.choose` names.

    tokens: the per-token inputs by name, each (B, T, ...), of one shape, dtype and device. vectors: inputs without
    token axes, of the shape of one token. scan: the plain loop. empty: the state of one row before any token, for a
    per-token input. Other arguments and the results as in the public functions. Raises ValueError naming the argument.
    """
    first = check_tokens(tokens, dims=4 if op != "wkv4" else 3)
    dtype = wide_dtype(first.dtype)
    for name, x in vectors.items():
        check_tensor(name, x, tuple(first.shape[2:]), first.device)
    batch, count = first.shape[:2]
    in_graph = torch.compiler.is_compiling()
    packed = None if starts is None or in_graph else packed_row(starts, batch, count)
    segments = batch if starts is None else (len(starts) if packed is None else len(packed)) - 1
    shape = (segments, *first.shape[2:], 3 if op == "wkv4" else first.shape[-1])
    if state is None:
        state = empty(first).to(dtype).expand(shape)
    check_tensor("state", state, shape, first.device)
    inputs, constants, state = tuple(tokens.values()), tuple(x.to(dtype) for x in vectors.values()), state.to(dtype)
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (state, *inputs, *constants))
    if in_graph:  # one operator, which ops/in_graph.py has registered; `starts` is a tensor then, or None
        y, last, *_ = torch.ops.rwkv_rlhf.recurrence(op, [*inputs, *constants], state, starts, backend, records)
        return y, last
    name, _ = choose(op, first.device, first.dtype, tuple(first.shape), backend)
    rows = even_starts(batch, count) if packed is None else packed
    if name == "naive":
        return _in_segments(scan, inputs, constants, state, None if packed is None else packed.lengths)
    run = kernel(op, name, first.device, first.dtype, first.shape)
    if BACKENDS[name].own_gradient:
        y, last = run((*inputs, *constants), state, rows)
    elif records:
        y, last = _Compiled.apply(run, rows, state, *inputs, *constants)
    else:
        y, last = run.forward((*inputs, *constants), state, rows, False)
    return y, last


def check_tokens(inputs: dict[str, Tensor], dims: int) -> Tensor:
    """The first of the per-token inputs, which must all agree. Raises ValueError naming the one that does not."""
    (first_name, first), *others = inputs.items()
    if first.dim() != dims:
        wanted = "(batch, tokens, heads, head size)" if dims == 4 else "(batch, tokens, channels)"
        raise ValueError(f"{first_name} must have shape {wanted}, not {tuple(first.shape)}")
    if first.dtype not in DTYPES:
        raise ValueError(f"{first_name} must be bfloat16, float16, float32 or float64, not {first.dtype}")
    for name, x in others:
        if x.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but {first_name} has {tuple(first.shape)}")
        if x.dtype != first.dtype:
            raise ValueError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")
    return first


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless `x` is a floating-point tensor of this shape on this device."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but these inputs need {shape}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, not {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the other inputs are on {device}")


def packed_row(starts: Tensor | Starts, batch: int, tokens: int) -> Starts:
    """The segments of one packed row of so many tokens. Raises ValueError."""
    found = Starts.of(starts)
    if batch != 1:
        raise ValueError(f"starts needs packed rows with batch size 1, but the batch size is {batch}")
    if not found.fit(tokens):
        raise ValueError(f"starts must rise from 0 to the {tokens} tokens without a step back, not {found}")
    return found


def _in_segments(
    scan: Scan, inputs: tuple[Tensor, ...], vectors: tuple[Tensor, ...], state: Tensor, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """`scan` over the rows of a batch, or over one packed row segment by segment; y in the dtype of the inputs."""
    dtype = inputs[0].dtype
    inputs = tuple(x.to(state.dtype) for x in inputs)
    if lengths is None:
        y, state = scan(inputs, vectors, state)
        return y.to(dtype), state
    parts = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    runs = [scan(part, vectors, row) for part, row in zip(parts, state.split(1), strict=True)]
    return torch.cat([y for y, _ in runs], dim=1).to(dtype), torch.cat([last for _, last in runs])


class _Compiled(torch.autograd.Function):
    """y, final state = kernel(initial state, per-token inputs, vectors).

    A kernel has two functions, whatever the recurrence and the device (ops/calls.py has the shapes):
        forward(inputs and vectors, state, starts, keep) -> [y, final state, *what backward needs if keep]
        backward(inputs and vectors, kept, dy, dlast) -> [a gradient for each input and vector, dstate]
    """

    @staticmethod
    def forward(ctx: Any, kernel: Any, starts: Sequence[int], state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, last, *kept = kernel.forward(inputs, state, starts, True)
        ctx.save_for_backward(*inputs, *kept)
        ctx.kernel, ctx.count = kernel, len(inputs)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives them a single time
        *grads, dstate = ctx.kernel.backward(saved[: ctx.count], saved[ctx.count :], dy, dlast)
        return (None, None, dstate, *grads)
