"""How a backend of a recurrence is judged: realistic inputs, all values and gradients, and how far they are off.

Tests, benchmarks and `--doctor 1` judge by the same measure: RMS(difference) / RMS(reference) for each tensor.

B batch, T tokens, H heads, N head size, S rows or packed segments
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops.wkv4 import wkv4
from rwkv_rlhf.ops.wkv5 import wkv5
from rwkv_rlhf.ops.wkv6 import wkv6
from rwkv_rlhf.ops.wkv7 import wkv7
from rwkv_rlhf.precision import wide_dtype


class Recurrence(NamedTuple):
    """A public function and how to make inputs for it: `tokens` per token, `vectors` of one token's shape."""

    function: Callable[..., tuple[Tensor, Tensor]]
    tokens: dict[str, tuple[float, float]]  # name -> mean and spread
    vectors: dict[str, tuple[float, float]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs in the order of the public function."""
        return (*self.tokens, *self.vectors)


# Means and spreads as a trained model has them; the decays w cover slow and fast channels. a and b of wkv7 are made
# from kk, the normalised a, and a rate, the sigmoid of b.
RECURRENCES = {
    "wkv4": Recurrence(wkv4, {"k": (0, 1), "v": (0, 1)}, {"w": (-1, 2), "u": (0, 0.5)}),
    "wkv5": Recurrence(wkv5, {"r": (0, 0.5), "k": (0, 0.3), "v": (0, 1)}, {"w": (-3, 1.5), "u": (0, 0.5)}),
    "wkv6": Recurrence(wkv6, {"r": (0, 0.5), "k": (0, 0.3), "v": (0, 1), "w": (-3, 1.5)}, {"u": (0, 0.5)}),
    "wkv7": Recurrence(wkv7, {"r": (0, 0.5), "w": (0, 2), "k": (0, 0.3), "v": (0, 1), "a": (0, 1), "b": (0, 1)}, {}),
}


def make_inputs(
    op: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Inputs of `op` that require gradients, for shape (B, T, H, N); wkv4 gets C = H * N channels.

    Per-token inputs are of `dtype`; vectors float32, or float64 beside float64. The values do not depend on the device.
    """
    recurrence, generator = RECURRENCES[op], torch.Generator().manual_seed(seed)
    batch, tokens, heads, size = shape
    one = (heads * size,) if op == "wkv4" else (heads, size)

    def noise(shape: tuple[int, ...], mean: float, spread: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean

    made = {name: noise((batch, tokens, *one), *law) for name, law in recurrence.tokens.items()}
    if op == "wkv7":
        kk = torch.nn.functional.normalize(made["a"], dim=-1)
        made["a"], made["b"] = -kk, kk * torch.sigmoid(made["b"])
    made = {name: x.to(device, dtype) for name, x in made.items()}
    wide = wide_dtype(dtype)
    made |= {name: noise(one, *law).to(device, wide) for name, law in recurrence.vectors.items()}
    return [x.requires_grad_() for x in made.values()]


def make_state(
    op: str,
    rows: int,
    heads: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 5,
) -> Tensor:
    """An initial state of `rows` rows that requires gradients: (S, H, N, N), or (S, H * N, 3) for wkv4."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, heads * size, 3) if op == "wkv4" else (rows, heads, size, size)
    state = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
    if op == "wkv4":
        state[..., 1] = state[..., 1].abs() + 0.5  # a denominator
    return state.to(device, dtype).requires_grad_()


def meaning(op: str, state: Tensor) -> Tensor:
    """What a state stands for, whatever scale it is written in: for wkv4 its two sums p and q, (S, C, 2)."""
    return state[..., :2] * state[..., 2:].exp() if op == "wkv4" else state


def results(
    op: str, inputs: list[Tensor], state: Tensor, starts: Tensor | None = None, backend: str = "auto"
) -> dict[str, Tensor]:
    """y, the final state, and the gradients of a fixed scalar of both by every input and the initial state."""
    recurrence = RECURRENCES[op]
    y, last = recurrence.function(*inputs, state=state, starts=starts, backend=backend)
    last = meaning(op, last)
    generator = torch.Generator().manual_seed(9)  # weights that bfloat16 holds exactly, the same on every device
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, last.dtype) for x in (y, last)]
    loss = (y.to(last.dtype) * weights[0]).sum() + (last * weights[1]).sum()
    grads = torch.autograd.grad(loss, [*inputs, state])
    names = ("y", "final state", *(f"d{name}" for name in recurrence.names), "d initial state")
    return dict(zip(names, (y.detach(), last.detach(), *grads), strict=True))


def error(value: Tensor, reference: Tensor) -> float:
    """RMS(value - reference) / RMS(reference), computed in float64; infinite if a value is not finite."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    assert value.shape == reference.shape, f"{tuple(value.shape)} against {tuple(reference.shape)}"
    if not value.isfinite().all():
        return float("inf")
    return float((value - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(1e-30))


def errors(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, float]:
    """`error` for every tensor of two `results`."""
    assert values.keys() == references.keys()
    return {name: error(values[name], references[name]) for name in values}
