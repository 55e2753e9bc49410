"""The head in chunks of rows: logits of a chunk, and from the gradient of those logits the gradients of its inputs.

Legend: M rows (trained tokens), C width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rwkv_rlhf.precision import wide_dtype

# Columns of the vocabulary whose weight gradient is formed at once where it cannot be added in place (4096 x C).
COLUMNS = 4096


class Product:
    """A head that is nothing but x W^T: two matrix products a chunk, and one buffer of logits for all chunks."""

    def __init__(
        self, head: nn.Module, hidden: Tensor, chunk: int, params: Sequence[Tensor], need_hidden: bool
    ) -> None:
        dense = getattr(head, "dense", None)
        weight = head.weight if dense is None else dense(hidden.dtype)
        self.hidden = hidden
        self.weight = weight.detach().to(hidden.dtype)  # (V,C), in the dtype of the computation as the head itself does
        self.parts = _parts(hidden, chunk)
        self.chunk = min(chunk, len(hidden))
        self.buffer: Tensor | None = None  # made when logits are first asked for
        self.d_hidden = torch.empty_like(hidden) if need_hidden else None
        self.d_weight = torch.zeros_like(self.weight, dtype=_wide(params[0].dtype)) if params else None
        self.dtype = params[0].dtype if params else None
        self.narrow = hidden.new_empty(min(COLUMNS, len(self.weight)) if params else 0, hidden.shape[1])

    def logits(self, part: slice) -> Tensor:
        """Logits (rows of `part`, V) in hidden's dtype; valid, and free to be overwritten, until the next call."""
        rows = self.hidden[part]
        if self.buffer is None:
            self.buffer = self.hidden.new_empty(self.chunk, len(self.weight))
        return torch.mm(rows, self.weight.t(), out=self.buffer[: len(rows)])

    def push(self, part: slice, slope: Tensor) -> None:
        """Take the gradient with respect to the logits of `part`, the last ones asked for."""
        if self.d_hidden is not None:
            torch.mm(slope, self.weight, out=self.d_hidden[part])
        if self.d_weight is None:
            return
        rows = self.hidden[part]
        if self.d_weight.dtype == slope.dtype:
            self.d_weight.addmm_(slope.t(), rows)
            return
        for start in range(
            0, len(self.d_weight), COLUMNS
        ):  # summed over chunks in float32, one narrow product at a time
            total = self.d_weight[start : start + COLUMNS]
            total += torch.mm(slope[:, start : start + COLUMNS].t(), rows, out=self.narrow[: len(total)])

    def gradients(self) -> tuple[Tensor | None, list[Tensor]]:
        """d hidden (None if not needed) and the gradient of each parameter in `params`, handed out once."""
        found = [] if self.d_weight is None else [self.d_weight.to(self.dtype)]
        self.d_weight = None
        return self.d_hidden, found


class Module:
    """Any head, called as a module on each chunk, so adapters, packed weights and hooks behave as everywhere else.

    Chunks are half as long as asked for: beside the logits a gradient of them is held, and an adapter holds its own.
    """

    def __init__(
        self, head: nn.Module, hidden: Tensor, chunk: int, params: Sequence[Tensor], need_hidden: bool
    ) -> None:
        self.head, self.hidden, self.params = head, hidden, list(params)
        self.parts = _parts(hidden, max(1, chunk // 2))
        self.record = bool(need_hidden or self.params)
        self.d_hidden = torch.empty_like(hidden) if need_hidden else None
        self.d_params = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in self.params]
        self.rows = self.found = None

    def logits(self, part: slice) -> Tensor:
        """As `Product.logits`."""
        self.rows = self.found = None  # before the next chunk exists, not after
        with torch.set_grad_enabled(self.record):
            self.rows = self.hidden[part].detach().requires_grad_(self.d_hidden is not None)
            self.found = self.head(self.rows)
        # A copy: the head may have kept its output for its own backward pass.
        return self.found.detach().clone() if self.record else self.found

    def push(self, part: slice, slope: Tensor) -> None:
        """As `Product.push`."""
        inputs = self.params if self.d_hidden is None else [self.rows, *self.params]
        found = list(torch.autograd.grad(self.found, inputs, slope, allow_unused=True))
        if self.d_hidden is not None:
            rows = found.pop(0)
            self.d_hidden[part] = 0 if rows is None else rows
        for total, value in zip(self.d_params, found):
            if value is not None:
                total += value

    def gradients(self) -> tuple[Tensor | None, list[Tensor]]:
        """As `Product.gradients`."""
        found = [total.to(p.dtype) for total, p in zip(self.d_params, self.params)]
        self.d_params = []
        return self.d_hidden, found


def open_head(
    head: nn.Module, hidden: Tensor, chunk: int, params: Sequence[Tensor] = (), need_hidden: bool = False
) -> Product | Module:
    """Start one run over the rows of `hidden` (M,C); `params` are the head's parameters that need a gradient."""
    return (Product if is_product(head) else Module)(head, hidden, chunk, params, need_hidden)


def is_product(head: nn.Module) -> bool:
    """Whether head(x) is x W^T and nothing else: nn.Linear without bias, or the model's linear without an adapter.

    An adapter has parameters beside `weight`. A hook (a sharding strategy gathers the weight in one) must be run.
    """
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return False
    names = {name for name, _ in head.named_parameters()}
    if type(head) is nn.Linear:
        return names == {"weight"}
    return callable(getattr(head, "dense", None)) and callable(getattr(head, "merged", None)) and names <= {"weight"}


def random_state(head: nn.Module, hidden: Tensor) -> list[Tensor] | None:
    """State of the random generators that a dropout in the head would draw from; None if the head cannot draw."""
    if is_product(head) or not head.training:
        return None
    states = [torch.get_rng_state()]
    if hidden.is_cuda:
        states.append(torch.cuda.get_rng_state(hidden.device))
    return states


@contextlib.contextmanager
def replayed(states: list[Tensor] | None, hidden: Tensor) -> Iterator[None]:
    """Draw again what was drawn after `random_state`, then leave the generators as they were found."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
        torch.set_rng_state(states[0])
        if hidden.is_cuda:
            torch.cuda.set_rng_state(states[1], hidden.device)
        yield


def _parts(hidden: Tensor, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, len(hidden))) for start in range(0, len(hidden), chunk)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Gradients are summed over chunks in at least float32."""
    return wide_dtype(dtype)
