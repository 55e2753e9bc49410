"""The model: embedding, blocks, final norm, head, perhaps scalar heads. One class for every version; the blocks differ.

Legend: B batch, T tokens, C width, V vocabulary, S packed segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_rlhf.layers.linear import Embedding, Linear
from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.model.blocks import Block, normalise
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.model.state import State
from rwkv_rlhf.ops.backends import prepare
from rwkv_rlhf.ops.product_ways import PLAIN, Ways
from rwkv_rlhf.ops.starts import Starts


class RWKV(nn.Module):
    """A language model whose whole memory is `State`.

    `compute_dtype` is the dtype of activations (bfloat16, float16, float32 or float64); parameters may be float32
    masters and are cast where they are used. `grad_cp` recomputes each block in the backward pass. `wkv_backend` forces
    a kernel. `dropout` is that of the residual stream, after the embedding and in the blocks, while training.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        compute_dtype: torch.dtype = torch.float32,
        grad_cp: bool = False,
        wkv_backend: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        from rwkv_rlhf.model import VERSIONS  # the table names the block classes, which need nothing from here

        self.sizes = sizes
        self.compute_dtype = compute_dtype
        self.grad_cp = grad_cp
        self.wkv_backend = wkv_backend
        self.dropout = dropout
        self.ways = PLAIN
        self._compiled: Callable[..., Any] | None = None
        self.emb = Embedding(sizes.vocab_size, sizes.n_embd)
        block = VERSIONS[sizes.version]
        self._at_first = block.at_first
        heads = sizes.head_size if sizes.head_size > 1 else 0
        self._kernels = [(block.time_mix.recurrence, heads), ("elementwise", 0), ("logprob", 0), ("products", 0)]
        self.blocks = nn.ModuleList(block(sizes, layer, dropout) for layer in range(sizes.n_layer))
        self.ln_out = nn.LayerNorm(sizes.n_embd)
        self.head = Linear(sizes.n_embd, sizes.vocab_size)
        for name in sizes.heads:
            self.add_module(name, Linear(sizes.n_embd, 1))

    def scalar_head(self, name: str) -> Linear | None:
        """The scalar head `name`, to be asked by `scalars`; None when there is none of that name, or "" is meant."""
        found = getattr(self, name) if name in self.sizes.heads else None
        assert found is None or isinstance(found, Linear)
        return found

    @property
    def draws(self) -> bool:
        """Whether a forward pass draws random numbers, for a dropout of the stream or of adapters."""
        adapters = (layer.adaptation for _, layer in matrices(self))
        return self.training and bool(self.dropout or any(how and how.dropout for how in adapters))

    def initial_state(self, rows: int) -> State:
        """What `rows` sequences remember before any token; the same as no state at all."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            layers.append(block.initial_state(rows, self.compute_dtype))
        return State(tuple(layers))

    def take_ways(self, ways: Ways) -> None:
        """Multiply by the model's matrices in these ways from now on, on a CPU."""
        self.ways = ways
        for _, layer in matrices(self):
            layer.take_ways(ways)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """From now on run blocks compiled by `backend` of torch.compile where they train; the first steps compile.

        Single tokens and passes that only look (sampling, scoring) stay as they are.
        """
        from rwkv_rlhf.model.in_graph import compiled_blocks  # importing torch's compiler takes seconds

        self._compiled = compiled_blocks(backend)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        starts: Tensor | Starts | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """tokens (B, T) int64 -> (hidden (B, T, C) after ln_out in the compute dtype, state after the last token).

        With `starts` (S+1,) int64, B is 1 and the row holds S documents one after the other; the states then have one
        row per document. T may be 0 with `starts`: the state comes back unchanged (None if there was none).
        A tensor of starts that lies on a GPU is waited for. Without `keep_state` there is no state in the result.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
        if self._kernels:
            prepare(self._kernels, tokens.device, self.compute_dtype, self.wkv_backend)
            self._kernels = []
        x = F.dropout(self.emb(tokens, self.compute_dtype), self.dropout, self.training)
        if tokens.shape[1] == 0:
            return x, state
        packed = None if starts is None else Starts.of(starts)
        carried = self._at_first(tokens)
        after = []
        recompute = self.grad_cp and torch.is_grad_enabled()
        call, borders = self._call(tokens, packed)
        for layer, block in enumerate(self.blocks):
            before = state[layer] if state is not None else None
            arguments = (block, x, carried, before, borders, self.wkv_backend, keep_state)
            if recompute:
                x, carried, layer_state = checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=True)
            else:
                x, carried, layer_state = call(*arguments)
            after.append(layer_state)
        return normalise(x, self.ln_out), State(tuple(after)) if keep_state else None

    def _call(self, tokens: Tensor, packed: Starts | None) -> tuple[Callable[..., Any], Starts | Tensor | None]:
        """What runs a block, and the borders of segments as it takes them: a compiled one as a tensor (S+1,)."""
        trains = torch.is_grad_enabled() or self.training
        if self._compiled is None or not trains or tokens.shape[1] == 1:
            return _run, packed
        if packed is not None and not packed.fit(tokens.shape[1]):
            raise ValueError(f"starts must rise from 0 to the {tokens.shape[1]} tokens without a step back: {packed}")
        return self._compiled, None if packed is None else packed.tensor


def _run(block: nn.Module, *arguments: Any) -> Any:
    return block(*arguments)
