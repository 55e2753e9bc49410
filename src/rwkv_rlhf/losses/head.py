"""The head in chunks of rows: logits of a chunk, and from the gradient of those logits the gradients of its inputs.

Legend: M rows (trained tokens), C width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rwkv_rlhf.ops.product_ways import PLAIN, Ways
from rwkv_rlhf.precision import wide_dtype

# Columns of the vocabulary whose logits or weight gradient (4096 x C) are made at once where that cannot be in place.
COLUMNS = 4096


class Product:
    """A head that is nothing but x W^T: two matrix products a chunk, and one buffer of logits for all chunks."""

    def __init__(
        self, head: nn.Module, hidden: Tensor, head_chunk: int, params: Sequence[Tensor], need_hidden: bool
    ) -> None:
        dense: Callable[[torch.dtype], Tensor] | None = getattr(head, "dense", None)
        weight = head.get_parameter("weight") if dense is None else dense(hidden.dtype)
        self.hidden = hidden
        self.ways: Ways = getattr(head, "ways", PLAIN)
        self.weight = weight.detach().to(hidden.dtype)  # (V,C), in the dtype of the computation as the head itself does
        self.chunks = _chunks(hidden, head_chunk)
        self.head_chunk = min(head_chunk, len(hidden))
        self.buffer: Tensor | None = None  # made when logits are first asked for
        self.d_hidden = torch.empty_like(hidden) if need_hidden else None
        # summed over chunks in at least float32; the first chunk is written where the others are added
        self.d_weight = torch.empty_like(self.weight, dtype=wide_dtype(params[0].dtype)) if params else None
        self.pushed = False
        self.dtype = params[0].dtype if params else None
        self.columns = _chunks(self.weight, COLUMNS)
        self.narrow = hidden.new_empty(min(COLUMNS, len(self.weight)) if params else 0, hidden.shape[1])

    def logits(self, chunk: slice) -> Tensor:
        """Logits (rows of `chunk`, V) in hidden's dtype; valid, and free to be overwritten, until the next call."""
        hidden = self.hidden[chunk]
        if self.buffer is None:
            self.buffer = self.hidden.new_empty(self.head_chunk, len(self.weight))
        found = self.buffer[: len(hidden)]
        if not self.ways.takes(hidden, self.weight, "output"):
            return torch.mm(hidden, self.weight.t(), out=found)
        for columns in self.columns:  # a way makes a new tensor, which had better be small
            found[:, columns] = self.ways.times("output", hidden, self.weight[columns])
        return found

    def push(self, chunk: slice, slope: Tensor) -> None:
        """Take the gradient with respect to the logits of `chunk`, the last ones asked for."""
        own = self.ways.takes(slope, self.weight, "weight")
        if self.d_hidden is not None and self.ways.takes(slope, self.weight, "input"):
            self.d_hidden[chunk] = self.ways.input_gradient(slope, self.weight)
        elif self.d_hidden is not None:
            torch.mm(slope, self.weight, out=self.d_hidden[chunk])
        if self.d_weight is None:
            return
        hidden, first = self.hidden[chunk], not self.pushed
        self.pushed = True
        if self.d_weight.dtype == slope.dtype and not own:
            torch.addmm(self.d_weight, slope.t(), hidden, beta=0 if first else 1, out=self.d_weight)
            return
        for columns in self.columns:  # one narrow product at a time, widened as it is added
            total = self.d_weight[columns]
            if own:
                found = self.ways.weight_gradient(slope[:, columns], hidden)
            else:
                found = torch.mm(slope[:, columns].t(), hidden, out=self.narrow[: len(total)])
            if first:
                total.copy_(found)
            else:
                total += found

    def gradients(self) -> tuple[Tensor | None, list[Tensor]]:
        """d hidden (None if not needed) and the gradient of each parameter in `params`, handed out once."""
        if self.d_weight is not None and not self.pushed:
            self.d_weight.zero_()
        found = [] if self.d_weight is None else [self.d_weight.to(self.dtype)]
        self.d_weight = None
        return self.d_hidden, found


class Module:
    """Any head, called as a module on each chunk, so adapters, packed weights and hooks behave as everywhere else.

    Chunks are half as long as asked for: beside the logits a gradient of them is held, and an adapter holds its own.
    """

    def __init__(
        self, head: nn.Module, hidden: Tensor, head_chunk: int, params: Sequence[Tensor], need_hidden: bool
    ) -> None:
        self.head, self.hidden, self.params = head, hidden, list(params)
        self.chunks = _chunks(hidden, max(1, head_chunk // 2))
        self.record = bool(need_hidden or self.params)
        self.d_hidden = torch.empty_like(hidden) if need_hidden else None
        self.d_params = [torch.zeros_like(p, dtype=wide_dtype(p.dtype)) for p in self.params]
        self.inputs: Tensor | None = None  # of the newest chunk, a leaf of its graph
        self.outputs: Tensor | None = None

    def logits(self, chunk: slice) -> Tensor:
        """As `Product.logits`."""
        self.inputs = self.outputs = None  # before the next chunk exists, not after
        with torch.set_grad_enabled(self.record):
            self.inputs = self.hidden[chunk].detach().requires_grad_(self.d_hidden is not None)
            outputs: Tensor = self.head(self.inputs)
        self.outputs = outputs
        # A copy: the head may have kept its output for its own backward pass.
        return outputs.detach().clone() if self.record else outputs

    def push(self, chunk: slice, slope: Tensor) -> None:
        """As `Product.push`."""
        assert self.inputs is not None and self.outputs is not None, "no logits were asked for"
        leaves = self.params if self.d_hidden is None else [self.inputs, *self.params]
        found = list(torch.autograd.grad(self.outputs, leaves, slope, allow_unused=True))
        if self.d_hidden is not None:
            slope_of_hidden = found.pop(0)
            self.d_hidden[chunk] = 0 if slope_of_hidden is None else slope_of_hidden
        for total, value in zip(self.d_params, found):
            if value is not None:
                total += value

    def gradients(self) -> tuple[Tensor | None, list[Tensor]]:
        """As `Product.gradients`."""
        found = [total.to(p.dtype) for total, p in zip(self.d_params, self.params)]
        self.d_params = []
        return self.d_hidden, found


def open_head(
    head: nn.Module, hidden: Tensor, head_chunk: int, params: Sequence[Tensor] = (), need_hidden: bool = False
) -> Product | Module:
    """Start one run over the rows of `hidden` (M,C); `params` are the head's parameters that need a gradient."""
    kind: type[Product] | type[Module] = Product if is_product(head) else Module
    return kind(head, hidden, head_chunk, params, need_hidden)


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


def _chunks(hidden: Tensor, head_chunk: int) -> list[slice]:
    return [slice(start, min(start + head_chunk, len(hidden))) for start in range(0, len(hidden), head_chunk)]
