"""Long rows in pieces (ops/triton/pieces.py), in Triton's interpreter on the CPU.

The judge is the plain loop in float64. States last over several pieces here, or an M that is wrong would not show.
"""

import itertools

import pytest
import torch

from rwkv_rlhf.ops import in_graph, judge, recurrence
from rwkv_rlhf.ops.judge import RECURRENCES, make_inputs, make_state, results
from rwkv_rlhf.ops.starts import Starts
from tests.support.lasting import lasting

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of infinities that are masked
]

from rwkv_rlhf.ops.triton import launch, recurrences  # noqa: E402
from rwkv_rlhf.ops.triton.recurrences import GROUP, SHORTEST, MatrixKernel, Tiles, piece_length, piece_table  # noqa: E402

if not launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)

OPS = ["wkv5", "wkv6", "wkv7"]
CPU = torch.device("cpu")
EXACT = 2e-6  # as for whole rows
NARROW = Tiles(16, 32, 4)
LENGTHS = [0, 129, 5, 0, 66]  # in pieces of 64: two rows that are cut, a short one, and empty ones


def starts_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


@pytest.fixture
def pieces(monkeypatch):
    """pieces(length): rows of the test are cut at each `length` tokens, 0: not at all."""

    def use(length, tiles=NARROW):
        for module in (recurrence, in_graph):
            monkeypatch.setattr(module, "kernel", lambda op, *_: MatrixKernel(op, tiles, length))

    return use


def errors(op, inputs, state, starts=None):
    """Of values and all gradients, against the plain loop in float64."""
    wide = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    exact = results(op, wide[:-1], wide[-1], starts, backend="naive")
    return judge.errors(results(op, inputs, state, starts, backend="triton"), exact)


@pytest.mark.parametrize("op", OPS)
def test_rows_in_pieces_are_whole_rows(pieces, op):
    """If this breaks, a long row on a GPU loses or distorts what it knew when the next piece began, or a packed row
    leaks into its neighbour; and so do the gradients, those of u, of WKV-5's w and of the states too."""
    pieces(64)
    inputs, state = lasting(op, make_inputs(op, (1, sum(LENGTHS), 2, 32))), make_state(op, len(LENGTHS), 2, 32)
    found = errors(op, inputs, state, starts_of(LENGTHS))
    assert not {name: error for name, error in found.items() if not error <= EXACT}


@pytest.mark.parametrize("op", OPS)
def test_nothing_begins_from_nothing(pieces, op):
    """Two rows of a batch, no packing, no first state: what most runs on one document have."""
    pieces(64)
    inputs = lasting(op, make_inputs(op, (2, 70, 1, 32)))
    found = errors(op, inputs, torch.zeros(2, 1, 32, 32, requires_grad=True))
    assert not {name: error for name, error in found.items() if not error <= EXACT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "size", "tiles"),
    [
        ("wkv7", 64, Tiles(16, 64, 4)),
        ("wkv6", 64, Tiles(16, 32, 4)),
        ("wkv7", 128, Tiles(16, 64, 8)),
        ("wkv5", 64, Tiles(16, 64, 4)),
    ],
)
def test_every_head_size_in_pieces(pieces, op, size, tiles):
    """M has N rows, whatever the value channels of a program: a model with larger heads has them all."""
    pieces(64, tiles)
    inputs, state = lasting(op, make_inputs(op, (1, 66, 1, size))), make_state(op, 1, 1, size)
    assert not {name: error for name, error in errors(op, inputs, state).items() if not error <= EXACT}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_loses_no_more_in_pieces(pieces, op):
    """If this breaks, gradients of long rows in bf16 are worse than those of the same rows in a larger batch."""
    found = {}
    for length in (0, 64):
        pieces(length)
        inputs, state = lasting(op, make_inputs(op, (1, 100, 1, 32), torch.bfloat16)), make_state(op, 1, 1, 32)
        found[length] = errors(op, inputs, state)
    assert not {name: error for name, error in found[64].items() if not error <= 1.1 * found[0][name] + EXACT}


@pytest.mark.parametrize("op", ["wkv5", "wkv6"])
def test_decays_of_all_speeds_across_pieces(pieces, op):
    """From none to exactly 0, side by side: the decay of a whole piece is anything from 1 to e^-640, and finite."""
    pieces(64)
    inputs, state = make_inputs(op, (1, 100, 1, 32)), make_state(op, 1, 1, 32)
    w = inputs[RECURRENCES[op].names.index("w")]
    choice = torch.tensor([-100.0, -20.0, -9.0, -1.0, 2.0, 5.0, 100.0])
    with torch.no_grad():
        w.copy_(choice[torch.randint(len(choice), w.shape[-2:], generator=torch.Generator().manual_seed(2))])
        w[..., :4] = -20.0
    assert not {name: error for name, error in errors(op, inputs, state).items() if not error <= 2e-4}


def test_kept_states_are_those_of_whole_rows():
    """If this breaks, a compiled graph (`--compile 1`), which has room for whole rows' states alone, trains on others';
    or gradients are not the same bits in two runs."""
    lengths = [5, 80]
    starts, shape = Starts.of(starts_of(lengths)), (1, sum(lengths), 1, 32)
    inputs = [x.detach() for x in lasting("wkv7", make_inputs("wkv7", shape))]
    state = make_state("wkv7", len(lengths), 1, 32).detach()
    run, whole = MatrixKernel("wkv7", length=64), MatrixKernel("wkv7", length=0)
    y, last, *kept = run.forward(inputs, state, starts, True)
    _, _, *wanted = whole.forward(inputs, state, starts, True)
    assert [len(table) for table in (kept[1], wanted[1])] == [4, 3]
    used = [0, 1, 2]  # a state of the first row, two of the second
    assert len(kept[0]) == sum(lengths) // GROUP + len(lengths) and judge.error(kept[0][used], wanted[0][used]) <= EXACT
    shapes = run.graph_shapes(shape[1], shape, state.shape)
    held = run.to_graph(kept, shapes)
    assert [x.shape for x in held] == [tuple(wanted) for wanted in shapes]
    found = run.backward(inputs, kept, y, last)
    again = run.backward(inputs, run.from_graph(held, starts), y, last)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_graph_has_the_pieces_of_a_plain_step(pieces):
    """If this breaks, `--compile 1` loses the pieces of long rows, or trains on other gradients than a plain step."""
    pieces(64)
    starts = starts_of([0, 5, 70])
    inputs, state = lasting("wkv6", make_inputs("wkv6", (1, 75, 1, 32))), make_state("wkv6", 3, 1, 32)

    def run(*x):
        return RECURRENCES["wkv6"].function(*x, state=state, starts=starts, backend="triton")

    found = []
    for step in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y, last = step(*inputs)
        found.append([y, last, *torch.autograd.grad(y.square().sum() + last.square().sum(), [*inputs, state])])
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("lengths", "heads", "processors", "pieces"),
    [
        ([4096], 32, 132, 10),  # 320 programs: two for each processor
        ([4096], 12, 132, 16),  # none below SHORTEST
        ([1024], 32, 132, 4),
        ([8192, 8192], 12, 132, 24),
        ([4096, 10, 0, 200], 32, 132, 8 + 3),  # beside a long row short ones do not count
        ([4096] * 8, 32, 132, 8),  # enough rows
        ([500] * 2, 12, 132, 2),  # two pieces would take as long
        ([4096], 88, 132, 1),  # enough heads
        ([4096], 32, 1, 1),  # a CPU
        ([0], 32, 132, 1),
        ([10000], 1, 304, 40),
    ],
)
def test_rows_are_cut_where_processors_would_be_idle(lengths, heads, processors, pieces):
    """If this breaks, one long document leaves most of a GPU idle, or full batches do half their work again."""
    length = piece_length(lengths, heads, processors)
    assert length % GROUP == 0 and (length == 0 or length >= SHORTEST)
    assert len(piece_table(Starts.of(starts_of(lengths)), length)) == pieces + 1


def test_one_row_of_4096_tokens_fills_a_card(monkeypatch):
    """If this breaks, B1 T4096 C2048 runs on 32 of 132 processors, in forward or (which asks again) in a graph."""
    monkeypatch.setattr(recurrences, "processors", lambda device: 132)
    table = MatrixKernel("wkv7")._pieces(Starts([0, 4096]), 32, CPU)
    programs = (len(table) - 1) * 32
    assert programs >= 2 * 132 and recurrences.tiles(64, programs, 132).values == 64  # without narrower tiles


def test_borders_of_pieces(seed=4):
    """If this breaks, a piece reaches into the next document, or tokens run twice or never."""
    generator = torch.Generator().manual_seed(seed)
    for length in (0, 64, 256):
        lengths = torch.randint(0, 700, (9,), generator=generator).tolist()
        starts = Starts.of(starts_of(lengths))
        begins, rows, firsts, joints = piece_table(starts, length).T.tolist()
        count = len(begins) - 1
        assert begins[0] == 0 and begins[-1] == starts[-1] and firsts[: len(starts)][-1] == count
        for piece, (begin, end) in enumerate(itertools.pairwise(begins)):
            row = rows[piece]
            assert starts[row] <= begin <= end <= starts[row + 1]
            assert (begin - starts[row]) % GROUP == 0 and firsts[row] <= piece < firsts[row + 1]
            assert not length or end - begin <= length
        found = [piece for piece in range(count - 1) if rows[piece] == rows[piece + 1]]
        assert joints[: len(found)] == found and len(found) == count - len(lengths)
