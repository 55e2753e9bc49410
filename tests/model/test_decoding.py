"""One token of a few rows by programs on a CPU, against the model's own forward pass in float64."""

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout, matrices
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.decoding import Decoder
from rwkv_rlhf.model.state import State
from rwkv_rlhf.ops import decode
from tests.support.models import build, random_tensors
from tests.support.product_cases import error, four_bit, runnable_sets, stored_matrices, use_set


@pytest.fixture(autouse=True)
def _kernel():
    """Without a compiler everything here would judge the forward pass."""
    if refusal := decode.missing():
        pytest.skip(f"the kernel cannot be built here: {refusal}")


def begun(model, rows, tokens=2):
    """The state behind random rows of tokens, each row's own."""
    with torch.no_grad():
        return model(torch.randint(1, 300, (rows, tokens)))[1]


def changed(state, dtype):
    """The state for a model that computes in `dtype`: shifts in it, recurrences as they are kept."""
    parts = [part.float() if at % 3 == 1 else part.to(dtype) for at, part in enumerate(state.tensors())]
    return State.from_tensors([part.clone() for part in parts])


@torch.no_grad()
def judged(decoder, exact, state, dtype, rows, steps=3):
    """The largest error of the hidden rows and of the states over some tokens."""
    errors, own = [], changed(state, dtype)
    for _ in range(steps):
        tokens = torch.randint(1, 300, (rows,))
        hidden, state = exact(tokens[:, None], state=state)
        found, own = decoder(tokens, own)
        pairs = zip((found, *own.tensors()), (hidden[:, -1], *state.tensors()), strict=True)
        errors.append(max(error(a, b) for a, b in pairs))
        errors.append(error(decoder.logits(found), exact.head(hidden[:, -1])))
    return max(errors)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_token_is_that_of_the_forward_pass(version):
    """If this breaks, what is sampled is not what was trained. Rows with states of their own, few and more than fill
    whole panels, two head sizes, both dtypes."""
    for size, width, dtype, counts in (
        (64, 128, torch.float32, (1, 17, 131)),
        (32, 96, torch.float32, (3,)),
        (32, 96, torch.bfloat16, (3,)),
    ):
        tensors = random_tensors(version, n_embd=width, head_size=size)
        exact, decoder = build(tensors, torch.float64).eval(), Decoder(build(tensors, dtype).eval())
        assert decoder.able == (version != "x070a")
        for rows in counts if decoder.able else counts[:1]:
            limit = 1e-6 if dtype == torch.float32 else 3e-2
            assert judged(decoder, exact, begun(exact, rows), dtype, rows) < limit, (width, dtype, rows)


@torch.no_grad()
def test_rows_leave_and_join():
    """A row's answer is its own: the same bits alone, beside others, and on more threads."""
    model = build(random_tensors("x070")).eval()
    states = [begun(model, 1, tokens) for tokens in (2, 3, 4)]
    tokens = torch.randint(1, 300, (3, 6))

    def alone(row):
        decoder, state, found = Decoder(model), states[row].map(torch.clone), []
        for token in tokens[row]:
            hidden, state = decoder(token[None], state)
            found.append(hidden[0].clone())
        return found

    expected = [alone(row) for row in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        decoder, state, here = Decoder(model), State.concatenated(states[:2]), [0, 1]
        for step in range(6):
            if step == 2:  # row 0 leaves, row 2 joins
                state = State.concatenated([state.row(1), states[2].map(torch.clone)])
                here = [1, 2]
            ages = [step if row < 2 else step - 2 for row in here]
            hidden, state = decoder(torch.stack([tokens[row, age] for row, age in zip(here, ages)]), state)
            for at, (row, age) in enumerate(zip(here, ages)):
                assert torch.equal(hidden[at], expected[row][age]), (step, row)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("version", ["x040", "x060", "x070"])
def test_adapters_and_packed_matrices_run_inside(version):
    """The model that a user tunes or packs is the one that is sampled from: LoRA, int8, a matrix of each alone."""
    tensors = random_tensors(version, n_embd=64)
    names = [name for name, _ in matrices(build(tensors)) if name.startswith("blocks.")]
    layouts = [
        Layout({name: Adaptation.make("lora", 4, 8.0) for name in names}),
        Layout({name: Adaptation.make("lora", 4, 8.0) for name in names[1::2]}, frozenset(names[::2]), store="int8"),
    ]
    for layout in layouts:
        model = build_model(tensors, BuildOptions(torch.float32, layout=layout))[0].eval()
        with torch.no_grad():
            for _, layer in matrices(model):
                for parameter in layer.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
        decoder, state = Decoder(model), begun(model, 2)
        own = state.map(torch.clone)
        with torch.no_grad():
            for _ in range(3):
                tokens = torch.randint(1, 300, (2,))
                hidden, state = model(tokens[:, None], state=state)
                found, own = decoder(tokens, own)
                assert error(found, hidden[:, -1].double()) < 2e-6


@pytest.mark.parametrize("store", ["none", *STORES])
def test_a_plain_model_is_one_call_a_token(store):
    """Each native call and each pause of the threads costs as much as a small matrix, packed or not."""
    if store in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    for version in ("x040", "x052", "x060", "x070"):
        tensors = random_tensors(version, n_embd=128)
        names = [name for name, _ in matrices(build(tensors)) if name.startswith("blocks.")]
        options = BuildOptions(
            torch.float32, layout=Layout({}, frozenset(names if store != "none" else ()), store=store)
        )
        model = build_model(tensors, options)[0].eval()
        decoder, state = Decoder(model), begun(model, 2)
        tokens, own = torch.tensor([3, 4]), state.map(torch.clone)
        found, _ = decoder(tokens, own)
        assert decoder._program.calls == 1
        with torch.no_grad():
            assert error(found, model(tokens[:, None], state=state)[0][:, -1].double()) < 2e-6


def test_what_a_program_does_not_know_takes_the_forward_pass():
    """Hooks gather parameters, other backends were asked for: neither is passed over."""
    tensors = random_tensors("x070")
    hooked, elsewhere = build(tensors).eval(), build(tensors, wkv_backend="naive").eval()
    seen = []
    hooked.blocks[1].att.register_forward_hook(lambda *_: seen.append(1))
    for model in (hooked, elsewhere, build(tensors, torch.float64).eval()):
        assert not Decoder(model).able
        state, tokens = begun(model, 2), torch.tensor([3, 4])
        with torch.no_grad():
            expected, _ = model(tokens[:, None], state=state)
        assert torch.equal(Decoder(model)(tokens, state)[0], expected[:, -1])
    assert seen


def test_small_matrices_of_any_size():
    """Inner sizes that fill no register, one matrix or several, and each function behind a product."""
    for count, inner, outer in ((1, 5, 33), (1, 130, 64), (5, 24, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            program = decode.Program(3)
            x, matrix = torch.randn(3, count * inner), torch.randn(count, inner, outer).to(dtype)
            given = matrix if count > 1 else matrix[0]
            y = program.low_rank(x, given, torch.empty(count, 3, outer), decode.Finish.TANH)
            program.run()
            parts = x.double().view(3, count, inner).transpose(0, 1)
            assert error(y, torch.tanh(parts @ matrix.double())) < 1e-6


@pytest.mark.parametrize("isa", runnable_sets())
def test_products_of_few_and_many_rows(isa, monkeypatch):
    """Each function behind a product; rows, columns and outputs that fill no tile; matrices as they are stored."""
    use_set(monkeypatch, isa)
    for at, (rows, inputs, outputs) in enumerate(((3, 20, 7), (17, 320, 31), (150, 64, 25), (40, 576, 55))):
        x, gate = torch.randn(rows, inputs), torch.randn(rows, outputs)
        for name, matrix, dense in stored_matrices(outputs, inputs):
            for finish in decode.Finish if at < 2 else [decode.Finish.ADDED]:
                native, expected = torch.ones(rows, outputs), torch.ones(rows, outputs, dtype=torch.float64)
                program = decode.Program(rows)
                program.product(x, matrix, native, finish, gate)
                program.run()
                finish.write(x.double() @ dense.double().T, expected, gate.double())
                assert error(native, expected) < 1e-6, (rows, finish, name)


def test_products_side_by_side():
    """What lays out their inputs comes first: a product that began before its input was ready would be another."""
    program, given = decode.Program(2), [torch.randn(2, 64) for _ in range(4)]
    matrices = [four_bit(40, 64), torch.randn(40, 64).bfloat16(), torch.randn(40, 64), four_bit(40, 64)]
    found = [torch.empty(2, 40) for _ in given]
    for at, (x, matrix, y) in enumerate(zip(given, matrices, found)):
        program.product(x, matrix, y, beside=at > 0)
    program.run()
    for x, matrix, y in zip(given, matrices, found):
        dense = matrix.float() if isinstance(matrix, torch.Tensor) else matrix.dense().view(40, 64)
        assert error(y, x.double() @ dense.double().T) < 1e-6
