"""One token of each of a few rows on a CPU, by programs of ops/decode.py in place of the model's forward pass.

A block writes its part of the program in `decode`, beside its `forward`, which is the definition and the judge. Where
no program serves (a GPU, other numbers than float32 and bfloat16, a version without `decode`, modules with hooks, no
compiler), the forward pass runs.

Legend: R rows, C width, K inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.layers.stores.int8 import Int8
from rwkv_rlhf.model.blocks import Block, HeadsTimeMix
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import LayerState, State
from rwkv_rlhf.ops import calls, decode, products
from rwkv_rlhf.ops.decode import Finish, Kind, Program


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
        plain = type(layer) is Linear and not hooked(layer)
        if plain and layer.weight is not None and layer.weight.dtype in calls.DTYPES and layer.weight.is_contiguous():
            self.product(x, layer.weight.detach(), None, to, finish, gate, beside)
        elif plain and isinstance(layer.store, Int8) and layer.in_features % products.BLOCK == 0:
            self.product(x, layer.store.packed, layer.store.scale, to, finish, gate, beside)
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
        half: HeadsTimeMix,
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


def hooked(module: nn.Module) -> bool:
    """Whether something else happens when the module is called: sharded parameters are gathered, say."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Decoder:
    """Runs one token of each row of a model that does not change meanwhile."""

    def __init__(self, model: RWKV) -> None:
        self.model = model
        self.able = _able(model)
        self._made: dict[Hashable, Tensor] = {}
        self._program: Decoding | None = None
        self._state: list[Tensor] = []
        self._head: Decoding | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens (R,) int64 -> (hidden (R, C) after ln_out, the state behind them). `state` is used up: what comes back
        may be the same memory."""
        if not self.able:
            hidden, after = self.model(tokens[:, None], state=state)
            assert after is not None
            return hidden[:, -1], after
        state = state if all(part.is_contiguous() for part in state.tensors()) else state.map(Tensor.contiguous)
        run = self._programmed(len(tokens), state)
        run.x.copy_(self.model.emb(tokens))
        run.run()
        return run.buffer("normed", *run.x.shape).to(run.dtype, copy=True), state

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (R, C) -> what the head makes of it, (R, V) float32, until the next call."""
        if not self.able:
            return self.model.head(hidden).float()
        if self._head is None or self._head.rows != len(hidden):
            self._head = self._started(len(hidden))
            self._head.linear(self.model.head, self._head.x, "logits")
        self._head.x.copy_(hidden)
        self._head.run()
        return self._head.buffer("logits", len(hidden), self.model.sizes.vocab_size)

    def _started(self, rows: int) -> Decoding:
        return Decoding(rows, self.model.sizes.n_embd, self.model.compute_dtype, self._made)

    def _programmed(self, rows: int, state: State) -> Decoding:
        """The program for these rows and this memory of their states."""
        tensors, run = state.tensors(), self._program
        if run is None or run.rows != rows or any(a is not b for a, b in zip(tensors, self._state, strict=True)):
            run = self._started(rows)
            carried = None
            for block, layer in zip(self.model.blocks, state, strict=True):
                assert isinstance(block, Block)
                carried = decode_block(run, block, carried, layer)
            norm = self.model.ln_out
            run.mix(run.x, (run.vector(norm.weight), run.vector(norm.bias)), None, None, eps=norm.eps)
            self._program, self._state = run, tensors
        return run


def decode_block(run: Decoding, block: Block, carried: Tensor | None, state: LayerState) -> Tensor | None:
    """`Block.forward` for the program."""
    carried = block.att.decode(run, block.ln1, block.ln0 if block.first else None, carried, state)
    block.ffn.decode(run, block.ln2, state)
    return carried


def _able(model: RWKV) -> bool:
    """Whether programs serve."""
    parameters = list(model.parameters())
    return (
        isinstance(model, RWKV)
        and all(isinstance(block, Block) and block.decodes for block in model.blocks)
        and model.wkv_backend in ("auto", "cpu")
        and model.compute_dtype in (torch.float32, torch.bfloat16)
        and model.sizes.head_size in (1, *decode.HEAD_SIZES)
        and all(p.is_cpu and type(p.data) is Tensor and p.numel() for p in parameters)
        and not any(hooked(module) for block in model.blocks for module in (block, block.att, block.ffn))
        and not hooked(model)
        and decode.missing() is None
    )
