"""What a block writes its part of a program with: matrices as they are stored, parameters as ops/decode.py takes them.

Legend: R rows, C width, A attention width, D inner size of a low-rank vector, K inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.ops import calls
from rwkv_rlhf.ops.decode import Finish, Kind, Program
from rwkv_rlhf.ops.products import Packed


class Heads(Protocol):
    """An attention half with heads and a norm over each."""

    heads: int
    head_size: int
    ln_x: nn.GroupNorm


class Decoding(Program):
    """The program of one model for some rows; `x` (R, C) is their residual stream.

    `made` keeps what was computed of parameters, for the programs that follow for other rows.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, made: dict[Hashable, Tensor]) -> None:
        super().__init__(rows)
        self.dtype, self.made = dtype, made
        self.x = self.buffer("x", rows, width)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, in float32 and dense."""
        if key not in self.made:
            self.made[key] = make().detach().float().contiguous()
        return self.made[key]

    def vector(self, parameter: Tensor) -> Tensor:
        """A small tensor, flat."""
        return self.once(id(parameter), parameter.flatten)

    def matrix(self, parameter: Tensor, dtypes: Collection[torch.dtype] = tuple(calls.DTYPES)) -> Tensor:
        """A small matrix as it lies, or in float32 where it is not of `dtypes`."""
        if parameter.dtype in dtypes and parameter.is_contiguous():
            return parameter.detach()
        return self.once((id(parameter), "matrix"), lambda: parameter)

    def mixed(
        self,
        half: nn.Module,
        norm: nn.LayerNorm,
        shift: Tensor,
        shares: Callable[[], Tensor],
        first: nn.LayerNorm | None = None,
        difference: Tensor | None = None,
    ) -> list[Tensor]:
        """What one half of a block is given: the normalised stream and its mixes. `first`: ln0 of block 0."""
        before = None if first is None else (self.vector(first.weight), self.vector(first.bias))
        norms, mixes = (self.vector(norm.weight), self.vector(norm.bias)), self.once(id(half), shares)
        return self.mix(self.x, norms, shift, mixes, eps=norm.eps, before=before, difference=difference)

    def linear(
        self,
        layer: Linear,
        x: Tensor,
        y: Tensor | str,
        finish: Finish = Finish.PLAIN,
        gate: Tensor | None = None,
        beside: bool = False,
    ) -> Tensor:
        """y (R, O) = finish(layer(x (R, K))); `y` is a buffer or the name of one."""
        to = self.buffer(y, self.rows, layer.out_features) if isinstance(y, str) else y
        matrix = operand(layer) if type(layer) is Linear and not hooked(layer) else None
        if matrix is not None:
            self.product(x, matrix, to, finish, gate, beside)
        else:
            self.call(lambda: finish.write(layer(x.to(self.dtype)), to, gate))
        return to

    def inner(self, x: Tensor, matrix: Tensor, name: str, finish: Finish = Finish.PLAIN, beside: bool = True) -> Tensor:
        """The inner vector (R, D) of a low-rank one: finish(x (R, K) matrix (K, D))."""
        y = self.buffer(name, self.rows, matrix.shape[1])
        return self.low_rank(x, self.matrix(matrix), y, finish, beside)

    def heads(
        self,
        kind: Kind,
        half: Heads,
        rows: Sequence[Tensor | None],
        matrices: Sequence[Tensor | None],
        vectors: Sequence[Tensor | None],
        state: Tensor,
        eps: float,
        gate: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """One token of a recurrence with heads and the norm behind it: its output (R, A). In the order of the kernel:
        `rows` (R, ...), the low-rank `matrices` (D, A), `vectors` (A,), the gate."""
        heads, size = half.heads, half.head_size
        y = self.buffer("heads", self.rows, heads * size)
        small = [None if part is None else self.vector(part) for part in (*vectors, half.ln_x.weight, half.ln_x.bias)]
        dtypes = {part.dtype for part in matrices if part is not None}
        if len(dtypes) > 1 or not dtypes <= calls.DTYPES.keys():
            dtypes = {torch.float32}
        dense = [None if part is None else self.matrix(part, dtypes) for part in matrices]
        sizes = (self.rows, heads, size, *(0 if part is None else len(part) for part in dense))
        tensors = [*rows, *dense, *small, *gate, state, y]
        self.operation(kind, sizes, tensors, stored=dtypes.pop() if dtypes else torch.float32, eps=eps)
        return y


def operand(layer: Linear) -> Tensor | Packed | None:
    """The matrix of a layer as a product of ops/decode.py takes it; None where it lies otherwise."""
    if layer.store is not None:
        return layer.store.operand()
    weight = layer.weight
    return weight.detach() if weight is not None and weight.dtype in calls.DTYPES and weight.is_contiguous() else None


def hooked(module: nn.Module) -> bool:
    """Whether something else happens when the module is called: sharded parameters are gathered, say."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
