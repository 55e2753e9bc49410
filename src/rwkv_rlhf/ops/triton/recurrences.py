"""The recurrences through Triton, as ops/recurrence.py asks for them: memory, precisions, tile sizes, launches.

T tokens of all rows, C channels, H heads, N head size, S rows (packed segments), P pieces of rows
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.ops.triton import channel_state, matrix_state, pieces
from rwkv_rlhf.ops.triton.launch import current, dense, processors

GROUP = 64  # tokens between states that forward keeps for backward
SHORTEST = 256  # tokens of a piece of a row
HALF_TILE = 32  # rows of K and as many of M in a program of `pieces.sweep`
CHANNELS, CHANNEL_GROUP = 64, 32  # WKV-4: channels of a program, tokens between kept states
MANY_WARPS = 90  # compute capability from which backward programs have more warps
NAMES = {"wkv5": "rkvwu", "wkv6": "rkvwu", "wkv7": "rwkvab"}  # inputs in the order of the public functions
COARSE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiles(NamedTuple):
    """How a matrix-state kernel is cut: L tokens a chunk, VB value channels a program, and the threads of a program."""

    chunk: int
    values: int
    warps: int
    stages: int = 1


def tiles(size: int, programs: int, processors: int) -> Tiles:
    """Tiles for a head size and a number of rows (or pieces) times heads, on a device of so many processors.

    A chunk of WKV-5 and 6 has 16 tokens, because their decays may be e^-10 and two factors of e^80 must be finite.
    Value channels are halved, until 32, while two programs do not fall to each processor; 64 is the most of a program.
    """
    values = min(size, 64)
    while values > 32 and programs * (size // values) < 2 * processors:
        values //= 2
    return Tiles(chunk=16, values=values, warps=4 if size <= 64 else 8)


def piece_length(lengths: Sequence[int], heads: int, processors: int) -> int:
    """Tokens of the pieces that rows of these lengths are cut into, the last one shorter; 0: all rows run whole.

    Whole rows keep a processor busy for each head until their ends come: heads x T / longest of them, averaged over the
    longest row's time. Pieces cost about half as much again (for K and M of pieces.py), so they pay where fewer than
    two thirds of the processors would be busy. They are then so long that two programs fall to each processor without
    narrower tiles, but not below SHORTEST, and three of the longest row at least: of two, both passes would take as
    long as the row. An estimate; no GPU has timed it.
    """
    longest, tokens = max(lengths, default=0), sum(lengths)
    if longest < 3 * SHORTEST or 3 * heads * tokens >= 2 * processors * longest:
        return 0
    return max(SHORTEST, heads * tokens // (2 * processors) // GROUP * GROUP)


def piece_table(starts: Starts, length: int) -> Tensor:
    """(P+1, 4) int64 on the host, as matrix_state.py has it, for rows cut at each `length` tokens (0: not at all)."""
    assert length % GROUP == 0, "kept states lie at multiples of GROUP"
    counts = [max(1, -(-n // length)) if length else 1 for n in starts.lengths]
    firsts = list(itertools.accumulate(counts, initial=0))
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    begins = [starts[row] + (piece - firsts[row]) * length for piece, row in enumerate(rows)]
    joints = [piece for piece, (row, after) in enumerate(itertools.pairwise(rows)) if row == after]
    return torch.tensor(list(itertools.zip_longest([*begins, starts[-1]], rows, firsts, joints, fillvalue=0)))


def join_tiles(size: int) -> dict[str, Any]:
    """Value channels, warps and stages of `pieces.join`: many programs, as each is a chain of products by an M (N, N).

    The next M is fetched during a product, but not with heads of 128, whose M fills the 64 KiB of AMD's processors.
    """
    small = size <= 64
    return {"VB": 16, "num_warps": 4 if small else 8, "num_stages": 2 if small else 1}


def backward_warps(cut: Tiles, capability: int) -> int:
    """Warps of a backward program on a GPU of this compute capability (10 x major + minor; 0: not NVIDIA's).

    From 9.0 on twice the four of a forward program: a third of the spills. Below and on AMD it would be more of them.
    """
    return 2 * cut.warps if capability >= MANY_WARPS and cut.warps == tiles(64, 1, 1).warps else cut.warps


def capability(device: torch.device) -> int:
    """As `backward_warps` wants it."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Precision(NamedTuple):
    """Types of the coarse products' operands and ways of the fine products; see products.py."""

    coarse: Any
    fine: str


def precision(dtype: torch.dtype, device: torch.device) -> Precision:
    """float32 inputs keep float32 accuracy; 16-bit inputs have tf32 products where errors add up.

    AMD has no tf32 on every card: its float32 matrix instructions are exact. In the interpreter, operands are rounded
    as a GPU of NVIDIA rounds them.
    """
    if device.type == "cpu":
        return Precision(COARSE[dtype], "ieee" if dtype == torch.float32 else "emulated")
    if torch.version.hip:
        return Precision(COARSE[dtype], "ieee")
    return Precision(COARSE[dtype], "tf32x3" if dtype == torch.float32 else "tf32")


class MatrixKernel:
    """WKV-5.2, 6 or 7: `forward` and `backward` as ops/recurrence.py asks for them. The same bits on every run."""

    def __init__(self, op: str, cut: Tiles | None = None, length: int | None = None) -> None:
        self.op = op
        self.cut = cut  # None: chosen by `tiles`
        self.length = length  # of the pieces of rows, a multiple of GROUP, or 0; None: chosen by `piece_length`

    def forward(self, inputs: Sequence[Tensor], state: Tensor, starts: Sequence[int], keep: bool) -> list[Tensor]:
        """y, the final state, and if `keep` what backward needs. starts: where rows begin among the T tokens, and T."""
        x, first = self._named(inputs)
        rows, heads, size = state.shape[:3]
        table = self._pieces(Starts.of(starts), heads, first.device)
        programs = (len(table) - 1) * heads
        cut = self.cut or tiles(size, programs, processors(first.device))
        constants = self._constants(size, cut, inputs[0])
        y, last = torch.empty_like(first), torch.empty_like(state, memory_format=torch.contiguous_format)
        kept = state.new_empty(starts[-1] // GROUP + rows if keep else 0, *state.shape[1:])
        with current(first.device):
            matrix_state.forward[programs, size // cut.values](
                *(x.get(name, first) for name in "rwkvabu"),
                self._at_pieces(state, x, table, constants, back=False),
                table,
                y,
                last,
                kept,
                heads,
                KEEP=keep,
                **constants,
            )
        return [y.to(inputs[0].dtype), last, *((kept, table) if keep else ())]

    def backward(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], dy: Tensor, dlast: Tensor) -> list[Tensor]:
        """Gradients of the inputs, in their dtypes, and of the initial state."""
        x, first = self._named(inputs)
        states, table = kept
        heads, size = dlast.shape[1:3]
        count = len(table) - 1
        cut = self.cut or tiles(size, count * heads, processors(first.device))
        constants = self._constants(size, cut, inputs[0])
        dy = dy.to(first.dtype).contiguous()
        parts, chunks = size // cut.values, GROUP // cut.chunk
        programs = count * heads * parts
        by_key = first.new_empty if parts == 1 else dlast.new_empty  # parts of a sum are not rounded
        grads = {name: by_key(parts, *first.shape) for name in x if x[name].dim() == first.dim() and name != "v"}
        grads |= {name: dlast.new_empty(count, heads, parts, size) for name in x if x[name].dim() < first.dim()}
        grads["v"] = torch.empty_like(first)
        dstate = torch.empty_like(dlast, memory_format=torch.contiguous_format)
        with current(first.device):
            matrix_state.backward[count * heads, parts](
                *(x.get(name, first) for name in "rwkvabu"),
                states,
                table,
                dy,
                self._at_pieces(dlast, x | {"v": dy}, table, constants, back=True),
                *(grads.get(name, dstate) for name in "rwkvabu"),
                dstate,
                dlast.new_empty(programs, chunks, cut.values, size),
                dlast.new_empty(programs, chunks, cut.chunk, cut.chunk),
                dlast.new_empty(programs, chunks, cut.chunk, cut.values),
                heads,
                first.numel(),
                **constants | {"num_warps": backward_warps(cut, capability(first.device))},
            )
        found = []
        for name, given in zip(NAMES[self.op], inputs, strict=True):
            grad = grads[name]
            if given.dim() < first.dim():  # a vector: pieces, and parts by value channels
                grad = grad.sum((0, 2))
            elif name != "v":
                grad = grad.sum(0) if parts > 1 else grad[0]
            found.append(grad.to(given.dtype))
        return [*found, dstate]

    def graph_shapes(self, tokens: int, token: Sequence[int], state: Sequence[int]) -> list[Sequence[int]]:
        """As ops/calls.py has it."""
        return [(tokens // GROUP + state[0], *state[1:])]

    def to_graph(self, kept: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """As ops/calls.py has it; the states have this shape as it is."""
        return [kept[0]]

    def from_graph(self, held: Sequence[Tensor], starts: Starts) -> list[Tensor]:
        """As ops/calls.py has it."""
        return [held[0], self._pieces(starts, held[0].shape[1], held[0].device)]

    def _pieces(self, starts: Starts, heads: int, device: torch.device) -> Tensor:
        """`piece_table` on a device, for the length that was asked for or is chosen."""

        def table() -> Tensor:
            chosen = piece_length(starts.lengths, heads, processors(device)) if self.length is None else self.length
            return piece_table(starts, chosen)

        return starts.on(device, ("pieces", self.length, heads), table)

    def _at_pieces(
        self, state: Tensor, x: dict[str, Tensor], table: Tensor, constants: dict[str, Any], back: bool
    ) -> Tensor:
        """(P, H, N, N): the state before each piece of rows, from those before rows, (S, H, N, N).

        With `back` the gradient of the state after each piece, from those after rows; x's v is dy then.
        """
        rows, heads, size = state.shape[:3]
        joints, state = len(table) - 1 - rows, state.contiguous()
        if not joints:
            return state
        matrix = self.op == "wkv7"
        found = state.new_empty(joints + rows, *state.shape[1:])
        maps = state.new_empty(joints, heads, 2 * size if matrix else size + 1, size)
        constants = {name: value for name, value in constants.items() if name != "GROUP"} | {"BACK": back}
        if matrix:
            constants["VB"] = HALF_TILE
        given = (x.get(name, x["r"]) for name in "rwkvab")
        pieces.sweep[joints * heads, size // constants["VB"]](*given, table, maps, heads, **constants)
        join = join_tiles(size) | {"VERSION": constants["VERSION"], "N": size, "BACK": back}
        join["FINE"] = precision(state.dtype, state.device).fine
        pieces.join[rows * heads, size // join["VB"]](state, maps, table, found, heads, **join)
        return found

    def _named(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs by their letters, contiguous; and r, which every version has."""
        x = {name: dense(given) for name, given in zip(NAMES[self.op], inputs, strict=True)}
        return x, x["r"]

    def _constants(self, size: int, cut: Tiles, given: Tensor) -> dict[str, Any]:
        """What a kernel is compiled for."""
        coarse, fine = precision(given.dtype, given.device)
        cuts = {"VERSION": int(self.op[-1]), "N": size, "VB": cut.values, "L": cut.chunk, "GROUP": GROUP}
        return cuts | {"COARSE": coarse, "FINE": fine, "num_warps": cut.warps, "num_stages": cut.stages}


class ChannelKernel:
    """WKV-4: `forward` and `backward` as ops/recurrence.py asks for them. The same bits on every run."""

    CONSTANTS: ClassVar = {"BLOCK": CHANNELS, "GROUP": CHANNEL_GROUP, "num_warps": CHANNELS // 32}

    def forward(self, inputs: Sequence[Tensor], state: Tensor, starts: Sequence[int], keep: bool) -> list[Tensor]:
        """y, the final state, and if `keep` what backward needs. starts: where rows begin among the T tokens, and T."""
        k, v, w, u = (dense(x) for x in inputs)
        tokens, channels, rows = starts[-1], k.shape[-1], state.shape[0]
        state, edges = state.contiguous(), Starts.of(starts).edges_on(k.device)
        y, last = torch.empty_like(k), torch.empty_like(state)
        kept = state.new_empty(tokens // CHANNEL_GROUP + rows if keep else 0, channels, 3)
        grid = rows, triton.cdiv(channels, CHANNELS)
        with current(k.device):
            channel_state.forward[grid](k, v, w, u, state, edges, y, last, kept, channels, KEEP=keep, **self.CONSTANTS)
        return [y.to(inputs[0].dtype), last, *((kept, edges, state, last) if keep else ())]

    def backward(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], dy: Tensor, dlast: Tensor) -> list[Tensor]:
        """Gradients of the inputs, in their dtypes, and of the initial state."""
        k, v, w, u = (dense(x) for x in inputs)
        channels, rows = k.shape[-1], dlast.shape[0]
        states, edges, state, last = kept
        grid = rows, triton.cdiv(channels, CHANNELS)
        dk, dv, dstate = torch.empty_like(k), torch.empty_like(v), torch.empty_like(state)
        dw, du = dlast.new_empty(2, rows, channels)
        scratch = dlast.new_empty(*grid, CHANNEL_GROUP, 3, CHANNELS)
        given = k, v, w, u, states, edges, dy.to(k.dtype).contiguous(), state, last, dlast.contiguous()
        with current(k.device):
            channel_state.backward[grid](*given, dk, dv, dw, du, dstate, scratch, channels, **self.CONSTANTS)
        grads = dk, dv, dw.sum(0), du.sum(0)
        return [*(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), dstate]

    def graph_shapes(self, tokens: int, token: Sequence[int], state: Sequence[int]) -> list[Sequence[int]]:
        """As ops/calls.py has it."""
        return [(tokens // CHANNEL_GROUP + state[0], *state[1:]), state, state]

    def to_graph(self, kept: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """As ops/calls.py has it; the first and the last state are also an input and a result."""
        states, _, state, last = kept
        return [states, state.clone(), last.clone()]

    def from_graph(self, held: Sequence[Tensor], starts: Starts) -> list[Tensor]:
        """As ops/calls.py has it."""
        return [held[0], starts.edges_on(held[0].device), *held[1:]]


def kernel(op: str) -> MatrixKernel | ChannelKernel:
    """What runs the recurrence `op`."""
    return ChannelKernel() if op == "wkv4" else MatrixKernel(op)
