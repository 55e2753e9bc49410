"""Context without limit: packed rows run chunk by chunk, with the gradient of one long forward pass.

Between two chunks only states cross. The forward pass runs without a graph and keeps the states at the borders; the
backward pass runs the chunks once more, from the last to the first, each with the gradient of the states that it handed
on. All chunks together are one autograd function whose inputs are the trained parameters, so that each of them gets its
summed gradient once, as DDP and ZeRO ask for. Memory: one chunk's graph, a state for each segment that crosses a
border, what the loss asks of each chunk (one number, or one for each token), and a second buffer of gradients.

A slot is the place where a boundary state is kept; that of a prompt may be begun from twice, by both answers.

Legend: T tokens of a packed row, S segments (documents, prompts, answers), t tokens of a chunk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.host_memory import own_pages
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.ops.random_state import RandomState, replay
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.transfers import to_device

NEW = -1  # in place of a slot: a segment that begins from the initial state

# (hidden states (t, C) of a chunk, which tokens of the scored row they are) -> tensors by name, to be joined along
# their first axis: numbers for each token (t, ...), or sums over the chunk (1,)
Score = Callable[[Tensor, slice], dict[str, Tensor]]


class ChunkOptions(NamedTuple):
    """How rows run in chunks.

    sums: the scores are one number (1,) for all of a chunk. truncated: no gradient crosses a border within a segment
    (it still reaches a prompt from its answers). offload: boundary states wait in host memory.
    """

    sums: bool = False
    truncated: bool = False
    offload: bool = False


EXACT = ChunkOptions()


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one packed row, and the segments that they belong to, wholly or in part.

    `span`: the tokens in the row. `starts`: of each segment's tokens in this chunk. `before`: the slot from which each
    begins, or NEW. `carries`: whether that is the same segment's own state (not that of a prompt). `after`: the slot
    that keeps the state of each, or NEW for none. `scored`: whether its tokens have scores.
    """

    tokens: Tensor  # (t,) int64
    span: slice
    starts: Starts
    before: tuple[int, ...]
    carries: tuple[bool, ...]
    after: tuple[int, ...]
    scored: bool

    def slots(self) -> list[int]:
        """The slots that segments begin from, each once."""
        return [slot for slot in dict.fromkeys(self.before) if slot != NEW]


@dataclass
class ChunkedRows:
    """Packed rows in chunks of at most `chunk_len` tokens, in the order in which they run."""

    chunk_len: int
    chunks: list[Chunk] = field(default_factory=list)
    slots: int = 0

    def add(
        self,
        tokens: Tensor,
        starts: Tensor | Starts,
        *,
        begin: Sequence[int] = (),
        keep: bool = False,
        scored: bool = True,
    ) -> list[int]:
        """Add one row of segments `starts` (S+1,); segment s begins from the slot begin[s], NEW if `begin` is empty.

        Returns for each segment the slot of its final state if `keep`, else NEW. An empty segment hands on the slot
        that it begins from.
        """
        edges = Starts.of(starts).edges
        last = list(begin) or [NEW] * (len(edges) - 1)  # the slot of each segment's newest state
        inherited = [True] * len(last)  # that state is not of the segment's own tokens
        for first in range(0, len(tokens), self.chunk_len):
            end = min(first + self.chunk_len, len(tokens))
            overlap = range(bisect_right(edges, first) - 1, bisect_left(edges, end))
            inside = [s for s in overlap if edges[s] < edges[s + 1]]
            before = tuple(last[s] for s in inside)
            carries = tuple(not inherited[s] for s in inside)
            for s in inside:
                goes_on = edges[s + 1] > end or keep
                last[s] = self._slot() if goes_on else NEW
                inherited[s] = False
            here = Starts([0, *(min(edges[s + 1], end) - first for s in inside)])
            after = tuple(last[s] for s in inside)
            self.chunks.append(Chunk(tokens[first:end], slice(first, end), here, before, carries, after, scored))
        return last if keep else [NEW] * len(last)

    def _slot(self) -> int:
        self.slots += 1
        return self.slots - 1


def run_in_chunks(model: RWKV, rows: ChunkedRows, score: Score, options: ChunkOptions = EXACT) -> dict[str, Tensor]:
    """What `score` says of all scored chunks, joined in their order, differentiable as if all had run in one pass.

    The backward pass can run only once.
    """
    run = _Run(model, rows, score, options)
    found = _ChunkedPass.apply(run, *run.params)
    return dict(zip(run.names, found, strict=True))


class _Run:
    """One pass over all chunks and back."""

    def __init__(self, model: RWKV, rows: ChunkedRows, score: Score, options: ChunkOptions) -> None:
        self.model, self.chunks, self.score, self.options = model, rows.chunks, score, options
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
        self.slots = rows.slots
        self.total = sum(1 if options.sums else len(chunk.tokens) for chunk in self.chunks if chunk.scored)
        self.names: tuple[str, ...] = ()  # of what `score` gives, known after the first chunk
        self.kept: State | None = None  # one row for each slot
        self.draws = model.draws
        self.random: list[RandomState | None] = []  # before each chunk, where a dropout draws

    def forward(self) -> tuple[Tensor, ...]:
        """All scores, in the order of `names`. The boundary states are kept for `backward`."""
        joined: tuple[Tensor, ...] = ()
        done = 0
        for chunk in self.chunks:
            self.random.append(RandomState.now(self.device) if self.draws else None)
            scores, states = self._run(chunk, {slot: self._kept(slot) for slot in chunk.slots()})
            if scores is not None:
                joined = joined or tuple(x.new_empty(self.total, *x.shape[1:]) for x in scores)
                span = slice(done, done + len(scores[0]))
                for whole, x in zip(joined, scores, strict=True):
                    whole[span] = x
                done = span.stop
            for row, slot in enumerate(chunk.after):
                if slot != NEW:
                    self._keep(slot, states.row(row))
        assert done == self.total, (done, self.total)
        return joined

    def backward(self, upstream: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Gradients of the trained parameters from those of the scores."""
        totals: list[Tensor | None] = [None] * len(self.params)
        slopes: dict[int, State] = {}  # slot -> gradient of the state that it keeps
        end = self.total
        for number in range(len(self.chunks) - 1, -1, -1):
            end = self._back(number, end, upstream, totals, slopes)
        return totals

    def _back(
        self,
        number: int,
        end: int,
        upstream: tuple[Tensor | None, ...],
        totals: list[Tensor | None],
        slopes: dict[int, State],
    ) -> int:
        """Run one chunk again and add its gradients to `totals` and `slopes`; its scores end before `end`.

        Returns where they begin. A function of its own, so that nothing of one chunk outlives it.
        """
        chunk = self.chunks[number]
        leaves = {slot: self._leaf(chunk, slot) for slot in chunk.slots()}
        with torch.enable_grad(), replay(self.random[number]):
            scores, states = self._run(chunk, leaves)
            ends = [states.row(row).tensors() for row in range(len(chunk.after))]
        begin = end if scores is None else end - len(scores[0])
        reached = []  # (output, its gradient)
        if scores is not None:
            reached += [(x, g[begin:end]) for x, g in zip(scores, upstream, strict=True) if g is not None]
        for row, slot in enumerate(chunk.after):
            if slot in slopes:
                reached += zip(ends[row], slopes.pop(slot).tensors(), strict=True)
        found = _gradients(reached, [*self.params, *(x for leaf in leaves.values() for x in leaf.tensors())])
        for i, p in enumerate(self.params):
            if (grad := next(found)) is not None:
                totals[i] = _sum(totals[i], grad, p)
        for slot, leaf in leaves.items():
            grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaf.tensors(), found)]
            if any(x.requires_grad for x in leaf.tensors()):
                slope = State.from_tensors(grads)
                slopes[slot] = slopes[slot] + slope if slot in slopes else slope
        return begin

    def _run(self, chunk: Chunk, given: dict[int, State]) -> tuple[tuple[Tensor, ...] | None, State]:
        """(scores if the chunk has any, states after it), from the states in the slots."""
        hidden, states = self.model(chunk.tokens[None], self._begin(chunk, given), chunk.starts)
        if not chunk.scored:
            return None, states
        scores = self.score(hidden[0], chunk.span)
        self.names = tuple(scores)
        return tuple(scores.values()), states

    def _begin(self, chunk: Chunk, given: dict[int, State]) -> State | None:
        """One row for each segment: the initial state, or the one in its slot."""
        if not given:
            return None
        states = list(given.values())
        place = {slot: row for row, slot in enumerate(given)}
        if NEW in chunk.before:
            place[NEW] = len(states)
            states.append(self.model.initial_state(1))
        rows = torch.tensor([place[slot] for slot in chunk.before])
        return State.concatenated(states).select(to_device(rows, self.device))

    def _leaf(self, chunk: Chunk, slot: int) -> State:
        """The state in a slot, asking for its gradient unless the border is one that no gradient crosses."""
        detached = self.options.truncated and chunk.carries[chunk.before.index(slot)]
        return self._kept(slot).map(lambda x: x.detach().requires_grad_(not detached))

    def _keep(self, slot: int, state: State) -> None:
        if self.kept is None:
            self.kept = state.map(self._room)
        for place, x in zip(self.kept.tensors(), state.tensors(), strict=True):
            place[slot].copy_(x[0], non_blocking=True)  # read only by copies that are queued later

    def _room(self, x: Tensor) -> Tensor:
        """A row like `x` (1, ...) for each slot. In the heap it would split the chunks' room, which then grows."""
        shape = (self.slots, *x.shape[1:])
        if self.device.type == "cpu":
            return own_pages(shape, x.dtype)
        if self.options.offload:
            return torch.empty(shape, dtype=x.dtype, pin_memory=True)
        return torch.empty(shape, dtype=x.dtype, device=self.device)

    def _kept(self, slot: int) -> State:
        assert self.kept is not None
        return self.kept.row(slot).map(lambda x: x.to(self.device, non_blocking=True))


def _sum(total: Tensor | None, grad: Tensor, p: Tensor) -> Tensor:
    """`total` and one more gradient of the parameter `p`, in place; sparse ones (of a table) with each row once."""
    if grad.is_sparse:
        return (grad if total is None else total + grad).coalesce()
    total = torch.zeros_like(p) if total is None else total
    total += grad
    return total


class _ChunkedPass(torch.autograd.Function):
    """(a run, its trained parameters) -> scores."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        scores = run.forward()
        if not any(ctx.needs_input_grad):
            run.kept = None
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        run, ctx.run = ctx.run, None
        assert run is not None, "the backward pass of a run in chunks can run only once"
        return (None, *run.backward(upstream))


def _gradients(reached: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> Iterator[Tensor | None]:
    """The gradients of `inputs`, from outputs and what they receive; None where nothing arrives."""
    reached = [(x, g) for x, g in reached if x.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not reached or not wanted:
        return iter([None] * len(inputs))
    outputs, grads = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    return iter([next(found) if x.requires_grad else None for x in inputs])
