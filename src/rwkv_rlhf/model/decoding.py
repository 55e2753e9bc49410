"""One token of each of a few rows on a CPU, by programs of ops/decode.py in place of the model's forward pass.

A block writes its part of the program in `decode`, beside its `forward`, which is the definition and the judge. Where
no program serves (a GPU, other numbers than float32 and bfloat16, a version without `decode`, modules with hooks, no
compiler), the forward pass runs.

Legend: R rows, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from rwkv_rlhf.model.blocks import Block
from rwkv_rlhf.model.program import Decoding, hooked
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import LayerState, State
from rwkv_rlhf.ops import decode


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


def _able(model: nn.Module) -> bool:
    """Whether programs serve."""
    if not isinstance(model, RWKV):
        return False
    parameters, blocks = list(model.parameters()), list(model.blocks)
    return (
        all(isinstance(block, Block) and block.decodes for block in blocks)
        and model.wkv_backend in ("auto", "cpu")
        and model.compute_dtype in (torch.float32, torch.bfloat16)
        and model.sizes.head_size in (1, *decode.HEAD_SIZES)
        and all(p.is_cpu and type(p.data) is Tensor and p.numel() for p in parameters)
        and not any(hooked(module) for block in blocks for module in (block, *block.children()))
        and not hooked(model)
        and decode.missing() is None
    )
