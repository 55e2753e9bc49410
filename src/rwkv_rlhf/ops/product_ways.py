"""Products with the matrices of a model on a CPU, y = x W^T and its two gradients, each by the way that is fastest.

A way is a function that multiplies (M, K) by (N, K), transposed. PyTorch's own goes to MKL in float32, which is slow on
processors that are not Intel's; oneDNN, which comes with PyTorch, is called directly through the operators that
torch.compile's code for CPUs calls. They are private to PyTorch, so they are tried and judged before they are used.
Which way is the fastest differs by the processor, the precision and the number of rows: ops/product_table.py measures.

Legend: M rows of x, K columns (inputs), N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TORCH, ONEDNN = "torch", "onednn"
MOST = (1, 4, 16, 64, 256)  # rows of each class; the last class has more
CLASSES = ("1", "2-4", "5-16", "17-64", "65-256", "257 and more")
SMALLEST = 256  # inputs and outputs of a matrix for which the way matters
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the root mean square


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K), transposed, by oneDNN: (M, N)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TORCH: F.linear, ONEDNN: by_onednn}


@functools.cache
def refusal(way: str, dtype: torch.dtype) -> str | None:
    """Why this build of PyTorch cannot take the way for this dtype; None where it can, and multiplies rightly."""
    if way == TORCH:
        return None
    if dtype not in LIMITS:
        return f"{way} multiplies in float32 and bfloat16"
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in ((19, 70), (45, 70)))
    g = torch.randn(19, 45, generator=generator).to(dtype)
    for a, b in ((x, w), (g, w.t()), (g.t(), x.t())):  # the output, and the gradients of the input and of the weight
        exact = F.linear(a.double(), b.double())
        try:
            found = WAYS[way](a, b)
        except (AttributeError, RuntimeError, TypeError) as error:
            return f"this build of PyTorch has no such operator ({str(error).splitlines()[0]})"
        if found.dtype != dtype or float((found - exact).square().mean().sqrt()) > LIMITS[dtype] * float(
            exact.square().mean().sqrt()
        ):
            return f"{way} gives wrong products on this machine"
    return None


@dataclass(frozen=True)
class Ways:
    """For each class of rows M the way of the output x W^T, of the input's gradient g W and of the weight's g^T x."""

    output: tuple[str, ...] = (TORCH,) * len(CLASSES)
    input: tuple[str, ...] = (TORCH,) * len(CLASSES)
    weight: tuple[str, ...] = (TORCH,) * len(CLASSES)

    @classmethod
    def all(cls, way: str) -> Ways:
        """One way for everything."""
        return cls(*((way,) * len(CLASSES) for _ in fields(cls)))

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Ways:
        """From `as_json`; what is not there, or is no way that is known, is PyTorch's."""
        rows = {name: tuple(found.get(name, ())) for name in PRODUCTS}
        return cls(**{name: row for name, row in rows.items() if len(row) == len(CLASSES) and set(row) <= set(WAYS)})

    def as_json(self) -> dict[str, list[str]]:
        """What a resume point says of them; nothing where all are PyTorch's."""
        return {name: list(getattr(self, name)) for name in PRODUCTS} if self != PLAIN else {}

    def possible(self, dtype: torch.dtype) -> Ways:
        """These, with PyTorch's own way instead of one that cannot be taken here."""
        rows = ([TORCH if refusal(way, dtype) else way for way in getattr(self, name)] for name in PRODUCTS)
        return Ways(*map(tuple, rows))

    def takes(self, x: Tensor, weight: Tensor, *products: str) -> bool:
        """Whether one of `products` (none named: of all) of `weight` (N, K) and so many rows as x or its gradient has
        (..., any) goes another way than PyTorch's own."""
        if self is PLAIN or not x.is_cpu or x.dtype not in LIMITS or torch.compiler.is_compiling():
            return False
        if min(weight.shape) < SMALLEST:
            return False
        rows = x.numel() // x.shape[-1]
        return rows > 0 and any(self.way(product, rows) != TORCH for product in products or PRODUCTS)

    def way(self, product: str, rows: int) -> str:
        """The way of "output", "input" or "weight" for so many rows."""
        found: str = getattr(self, product)[class_of(rows)]
        return found

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., K) times weight (N, K), transposed: (..., N); both of one dtype. Differentiable, once."""
        if not self.takes(x, weight):
            return F.linear(x, weight)
        y: Tensor = _Linear.apply(_rows(x), weight, self)
        return y.view(*x.shape[:-1], len(weight))

    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        """g (..., N) times weight (N, K): (..., K)."""
        if not self.takes(g, weight, "input"):
            return g @ weight
        return self.times("input", _rows(g), weight.t()).view(*g.shape[:-1], weight.shape[1])

    def weight_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """g (M, N), transposed, times x (M, K): (N, K)."""
        return WAYS[self.way("weight", len(g))](g.t(), x.t())

    def times(self, product: str, a: Tensor, b: Tensor) -> Tensor:
        """a (M, ...) times b transposed by the way of `product`, "output" or "input", for so many rows."""
        return WAYS[self.way(product, len(a))](a, b)


PLAIN = Ways()
PRODUCTS = tuple(field.name for field in fields(Ways))


def matters(dtype: torch.dtype, width: int) -> bool:
    """Whether another way than PyTorch's own may be faster for a model of this width."""
    return dtype in LIMITS and width >= SMALLEST


def class_of(rows: int) -> int:
    """The number in CLASSES of so many rows."""
    return sum(rows > most for most in MOST)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """x (M, K), weight (N, K) -> x W^T, each of the three products by its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ways: Ways) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.ways = ways
        return ways.times("output", x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        return (
            ctx.ways.times("input", g, weight.t()) if of_x else None,
            ctx.ways.weight_gradient(g, x) if of_weight else None,
            None,
        )
