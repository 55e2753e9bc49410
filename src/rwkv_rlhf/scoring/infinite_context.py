"""Context without limit: packed rows run piece by piece, with the gradient of one long forward pass.

Between two pieces only states cross. The forward pass runs without a graph and keeps the state at each cut; the
backward pass runs the pieces once more, from the last to the first, each with the gradient of the states that it handed
on. All pieces together are one autograd function whose inputs are the trained parameters, so that each of them gets its
summed gradient once, as DDP and ZeRO ask for. Memory: one piece's graph, a state for each cut, what the loss asks of
each piece (one number, or one for each token), and a second buffer of gradients.

A slot is the place where a state is kept; the state of a prompt may be begun from twice, by both answers.

Legend: T tokens of a packed row, S segments (documents, prompts, answers), t tokens of a piece.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_rlhf.host_memory import own_pages
from rwkv_rlhf.layers.placing import matrices
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State

NEW = -1  # in place of a slot: a segment that begins from the initial state

# (hidden states (t, C) of a piece, which tokens of the scored row they are) -> tensors to be joined along their first
# axis: numbers for each token (t, ...), or sums over the piece (1,)
Score = Callable[[Tensor, slice], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one packed row, and the segments (or parts of them) that they belong to.

    `here`: the tokens in the row. `lengths`: tokens of each segment in this piece. `before`: the slot from which each
    begins, or NEW. `carries`: whether that is the same segment's own state (not that of a prompt). `after`: the slot
    that keeps the state of each, or NEW for none. `scored`: whether its tokens have scores.
    """

    tokens: Tensor  # (t,) int64
    here: slice
    lengths: tuple[int, ...]
    before: tuple[int, ...]
    carries: tuple[bool, ...]
    after: tuple[int, ...]
    scored: bool

    def slots(self) -> list[int]:
        """The slots that segments begin from, each once."""
        return [slot for slot in dict.fromkeys(self.before) if slot != NEW]


@dataclass
class Pieces:
    """Packed rows cut into pieces of at most `length` tokens, in the order in which they run."""

    length: int
    pieces: list[Piece] = field(default_factory=list)
    slots: int = 0

    def add_row(
        self, tokens: Tensor, starts: Tensor, *, begin: Sequence[int] = (), keep: bool = False, scored: bool = True
    ) -> list[int]:
        """Cut one row of segments `starts` (S+1,); segment s begins from the slot begin[s], NEW if `begin` is empty.

        Returns for each segment the slot of its final state if `keep`, else NEW. An empty segment hands on the slot
        that it begins from.
        """
        edges = starts.tolist()
        last = list(begin) or [NEW] * (len(edges) - 1)  # the slot of each segment's newest state
        inherited = [True] * len(last)  # that state is not of the segment's own tokens
        for first in range(0, len(tokens), self.length):
            end = min(first + self.length, len(tokens))
            overlap = range(bisect_right(edges, first) - 1, bisect_left(edges, end))
            rows = [s for s in overlap if edges[s] < edges[s + 1]]
            before = tuple(last[s] for s in rows)
            carries = tuple(not inherited[s] for s in rows)
            for s in rows:
                goes_on = edges[s + 1] > end or keep
                last[s] = self._slot() if goes_on else NEW
                inherited[s] = False
            lengths = tuple(min(edges[s + 1], end) - max(edges[s], first) for s in rows)
            after = tuple(last[s] for s in rows)
            self.pieces.append(Piece(tokens[first:end], slice(first, end), lengths, before, carries, after, scored))
        return last if keep else [NEW] * len(last)

    def _slot(self) -> int:
        self.slots += 1
        return self.slots - 1


def piecewise(
    model: RWKV,
    pieces: Pieces,
    score: Score,
    *,
    sums: bool = False,
    truncated: bool = False,
    offload: bool = False,
) -> tuple[Tensor, ...]:
    """What `score` says of all scored pieces, in their order, differentiable as if all had run in one pass.

    sums: `score` gives one number (1,) for all of a piece. truncated: no gradient crosses a cut within a segment (it
    still reaches a prompt from its answers). offload: states at the cuts wait in host memory. The backward pass can run
    only once.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return _Piecewise.apply(_Run(model, pieces, score, sums, truncated, offload), *params)


class _Run:
    """One pass over all pieces and back."""

    def __init__(self, model: RWKV, pieces: Pieces, score: Score, sums: bool, truncated: bool, offload: bool) -> None:
        self.model, self.pieces, self.score = model, pieces.pieces, score
        self.truncated, self.offload = truncated, offload
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
        self.slots = pieces.slots
        self.rows = sum(1 if sums else len(piece.tokens) for piece in self.pieces if piece.scored)
        self.kept: State | None = None  # one row for each slot
        drawn = model.training and any(layer.adaptation and layer.adaptation.dropout for _, layer in matrices(model))
        self.random: list[list[Tensor]] | None = [] if drawn else None

    def forward(self) -> tuple[Tensor, ...]:
        """Scores of all scored tokens. The state of every cut is kept for `backward`."""
        joined: tuple[Tensor, ...] = ()
        done = 0
        for piece in self.pieces:
            if self.random is not None:
                self.random.append(generator_states(self.device))
            scores, states = self._run(piece, {slot: self._kept(slot) for slot in piece.slots()})
            if scores is not None:
                joined = joined or tuple(x.new_empty(self.rows, *x.shape[1:]) for x in scores)
                here = slice(done, done + len(scores[0]))
                for whole, x in zip(joined, scores, strict=True):
                    whole[here] = x
                done = here.stop
            for row, slot in enumerate(piece.after):
                if slot != NEW:
                    self._keep(slot, states.row(row))
        assert done == self.rows, (done, self.rows)
        return joined

    def backward(self, upstream: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Gradients of the trained parameters from those of the scores."""
        totals: list[Tensor | None] = [None] * len(self.params)
        slopes: dict[int, State] = {}  # slot -> gradient of the state that it keeps
        end = self.rows
        for number in range(len(self.pieces) - 1, -1, -1):
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
        """Run one piece again and add its gradients to `totals` and `slopes`; its scores end before row `end`.

        Returns the row at which they begin. A function of its own, so that nothing of one piece outlives it.
        """
        piece = self.pieces[number]
        leaves = {slot: self._leaf(piece, slot) for slot in piece.slots()}
        with torch.enable_grad(), generators_at(self.random and self.random[number], self.device):
            scores, states = self._run(piece, leaves)
            ends = [states.row(row).tensors() for row in range(len(piece.after))]
        begin = end if scores is None else end - len(scores[0])
        reached = []  # (output, its gradient)
        if scores is not None:
            reached += [(x, g[begin:end]) for x, g in zip(scores, upstream, strict=True) if g is not None]
        for row, slot in enumerate(piece.after):
            if slot in slopes:
                reached += zip(ends[row], slopes.pop(slot).tensors(), strict=True)
        found = _gradients(reached, [*self.params, *(x for leaf in leaves.values() for x in leaf.tensors())])
        for i, p in enumerate(self.params):
            if (grad := next(found)) is not None:
                totals[i] = torch.zeros_like(p) if totals[i] is None else totals[i]
                totals[i] += grad
        for slot, leaf in leaves.items():
            grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaf.tensors(), found)]
            if any(x.requires_grad for x in leaf.tensors()):
                slope = State.from_tensors(grads)
                slopes[slot] = slopes[slot] + slope if slot in slopes else slope
        return begin

    def _run(self, piece: Piece, given: dict[int, State]) -> tuple[tuple[Tensor, ...] | None, State]:
        """(scores if the piece has any, states after it), from the states in the slots."""
        starts = torch.tensor([0, *piece.lengths], device=self.device).cumsum(0)
        hidden, states = self.model(piece.tokens[None], self._begin(piece, given), starts)
        return (self.score(hidden[0], piece.here) if piece.scored else None), states

    def _begin(self, piece: Piece, given: dict[int, State]) -> State | None:
        """One row for each segment: the initial state, or the one in its slot."""
        if not given:
            return None
        states = list(given.values())
        place = {slot: row for row, slot in enumerate(given)}
        if NEW in piece.before:
            place[NEW] = len(states)
            states.append(self.model.initial_state(1))
        rows = torch.tensor([place[slot] for slot in piece.before], device=self.device)
        return State.concatenated(states).select(rows)

    def _leaf(self, piece: Piece, slot: int) -> State:
        """The state in a slot, asking for its gradient unless the cut is one that no gradient crosses."""
        cut = self.truncated and piece.carries[piece.before.index(slot)]
        return self._kept(slot).map(lambda x: x.detach().requires_grad_(not cut))

    def _keep(self, slot: int, state: State) -> None:
        if self.kept is None:
            self.kept = state.map(self._room)
        for place, x in zip(self.kept.tensors(), state.tensors(), strict=True):
            place[slot] = x[0]

    def _room(self, x: Tensor) -> Tensor:
        """A row like `x` (1, ...) for each slot. In the heap it would part the pieces' room, which then grows."""
        shape = (self.slots, *x.shape[1:])
        if self.device.type == "cpu":
            return own_pages(shape, x.dtype)
        where = {"pin_memory": True} if self.offload else {"device": self.device}
        return torch.empty(shape, dtype=x.dtype, **where)

    def _kept(self, slot: int) -> State:
        assert self.kept is not None
        return self.kept.row(slot).map(lambda x: x.to(self.device))


class _Piecewise(torch.autograd.Function):
    """(a run, its trained parameters) -> scores."""

    @staticmethod
    def forward(ctx, run, *params):
        ctx.run = run
        ctx.set_materialize_grads(False)
        scores = run.forward()
        if not any(ctx.needs_input_grad):
            run.kept = None
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        run, ctx.run = ctx.run, None
        assert run is not None, "the backward pass of a piecewise run can run only once"
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


def generator_states(device: torch.device) -> list[Tensor]:
    """Where the random generators stand that a dropout would draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextlib.contextmanager
def generators_at(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Draw again what was drawn from `states` on, then leave the generators as they were found."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
