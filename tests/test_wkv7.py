"""WKV-7: the plain loop against the formula and finite differences, the C++ kernel against the plain loop.

Errors are RMS(difference) / RMS(reference), per tensor.
"""

import math

import numpy as np
import pytest
import torch

from src.ops.build import BuildError, library
from src.ops.wkv7 import wkv7

NAMES = ("y", "final state", "dr", "dw", "dk", "dv", "da", "db", "d initial state")
LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The compiled kernel; these tests judge nothing without it."""
    try:
        library("wkv7")
    except BuildError as error:
        pytest.skip(f"the kernel cannot be built here: {error}")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are slower on several threads, in the plain loop above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(batch, tokens, heads, size, dtype=torch.float32, seed=0):
    """Inputs with the ranges that an RWKV-7 model feeds: a = -kk, b = kk * rate, |kk| = 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(batch, tokens, heads, size, generator=generator) * scale

    kk = torch.nn.functional.normalize(noise(1), dim=-1)
    parts = (noise(0.5), noise(2), noise(0.3), noise(1), -kk, kk * torch.sigmoid(noise(1)))
    return [x.to(dtype).requires_grad_() for x in parts]


def make_state(rows, heads, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, heads, size, size, generator=generator, dtype=dtype).mul_(0.5).requires_grad_()


def run(inputs, state, starts=None, backend="cpu"):
    """y, final state and the gradients of a fixed scalar of both, whose weights bfloat16 holds exactly."""
    y, last = wkv7(*inputs, state=state, starts=starts, backend=backend)
    generator = torch.Generator().manual_seed(9)
    weight_y, weight_last = (torch.randn(x.shape, generator=generator).bfloat16().float() for x in (y, last))
    loss = (y.float() * weight_y).sum() + (last * weight_last).sum()
    grads = torch.autograd.grad(loss, [*inputs, state])
    return [y.detach(), last.detach(), *grads]


def error(value, reference):
    value, reference = value.double(), reference.double()
    assert value.shape == reference.shape
    return float((value - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(1e-30))


def assert_close(values, references, limit=LIMIT):
    for name, value, reference in zip(NAMES, values, references, strict=True):
        assert torch.isfinite(value).all(), name
        assert error(value, reference) <= limit, name


def test_plain_loop_is_the_published_recurrence():
    """Written out in numpy from the definition, with the decay as exp(-exp(-softplus(-x) - 0.5))."""
    inputs = make(2, 5, 2, 4, torch.float64)
    state = make_state(2, 2, 4, torch.float64)
    y, last = wkv7(*inputs, state=state, backend="naive")
    r, w, k, v, a, b = (x.detach().numpy() for x in inputs)
    for row in range(2):
        for head in range(2):
            S = state.detach().numpy()[row, head].copy()
            for t in range(5):
                at = (row, t, head)
                decay = np.exp(-np.exp(-np.log1p(np.exp(-w[at])) - 0.5))
                S = S * decay + np.outer(S @ a[at], b[at]) + np.outer(v[at], k[at])
                np.testing.assert_allclose(y.detach().numpy()[at], S @ r[at], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(last.detach().numpy()[row, head], S, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 0, 2, 3])])
def test_plain_loop_gradients_match_finite_differences(starts):
    inputs = make(1, 3, 1, 3, torch.float64)
    state = make_state(1 if starts is None else 3, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, starts=starts, backend="naive"), (*inputs, state))


@pytest.mark.parametrize(
    ("size", "tokens"),
    [(64, t) for t in (1, 2, 63, 64, 65, 130)] + [(32, t) for t in (1, 16, 65, 130)] + [(128, t) for t in (2, 63, 65)],
)
def test_kernel_values_and_gradients_equal_the_plain_loop(size, tokens):
    inputs, state = make(2, tokens, 2, size), make_state(2, 2, size)
    assert_close(run(inputs, state), run(inputs, state, backend="naive"))


@pytest.mark.parametrize("threads", [2, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads):
    """With more threads than heads the values of a head are shared out: equal up to rounding, and repeatable."""
    inputs, state = make(1, 70, 1, 64), make_state(1, 1, 64)
    alone = run(inputs, state)
    torch.set_num_threads(threads)
    assert_close(run(inputs, state), alone, 1e-6)
    again = run(inputs, state)
    assert all(torch.equal(x, y) for x, y in zip(run(inputs, state), again, strict=True))


def test_packed_rows_equal_separate_runs():
    """Segments of 0, 70, 1, 0, 16 and 0 tokens, each with its own state: an empty one returns its state as it was."""
    lengths = [0, 70, 1, 0, 16, 0]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inputs, state = make(1, sum(lengths), 2, 64), make_state(len(lengths), 2, 64)
    packed = run(inputs, state, starts)
    assert_close(packed, run(inputs, state, starts, backend="naive"))
    for i, length in enumerate(lengths):
        part = [x.detach()[:, starts[i] : starts[i] + length] for x in inputs]
        y, last = wkv7(*part, state=state.detach()[i : i + 1], backend="cpu")
        assert torch.equal(packed[0][:, starts[i] : starts[i] + length], y)
        assert torch.equal(packed[1][i : i + 1], last)
        if length == 0:
            assert torch.equal(last, state.detach()[i : i + 1])


@pytest.mark.parametrize("cut", [1, 37, 64])
def test_carried_state_equals_one_long_pass(cut):
    """Values, and the gradient that flows back through the carried state."""
    inputs, state = make(2, 100, 1, 32), make_state(2, 1, 32)

    def in_two(*args, state, starts=None, backend):
        y1, middle = wkv7(*(x[:, :cut] for x in args), state=state, backend=backend)
        y2, last = wkv7(*(x[:, cut:] for x in args), state=middle, backend=backend)
        return torch.cat([y1, y2], dim=1), last

    whole, parts = wkv7(*inputs, state=state, backend="cpu"), in_two(*inputs, state=state, backend="cpu")
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in whole]
    results = []
    for outputs in (parts, whole):
        loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        results.append([*(x.detach() for x in outputs), *torch.autograd.grad(loss, [*inputs, state])])
    assert_close(*results)


def test_no_tokens_at_all_returns_the_state_and_its_gradient():
    inputs, state = make(2, 0, 1, 32), make_state(2, 1, 32)
    y, last, *_, dstate = run(inputs, state)
    assert y.shape == (2, 0, 1, 32) and torch.equal(last, state)
    weight = torch.randn(last.shape, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    assert torch.equal(dstate, weight)


@pytest.mark.parametrize("size", [32, 64])
def test_bfloat16_in_and_out(size):
    """Inputs, y and gradients are rounded to bfloat16, nothing else is: state and arithmetic stay float32."""
    inputs, state = make(1, 65, 2, size, torch.bfloat16), make_state(1, 2, size)
    values = run(inputs, state)
    assert values[0].dtype == torch.bfloat16 and values[1].dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in values[2:8])
    exact = [x.detach().float().requires_grad_() for x in inputs]
    references = run(exact, state)
    for name, value, reference in zip(NAMES, values, references, strict=True):
        rounded = reference.to(torch.bfloat16) if value.dtype == torch.bfloat16 else reference
        assert error(value, rounded) <= (1e-3 if value.dtype == torch.bfloat16 else LIMIT), name


def test_strided_inputs_and_gradients():
    """Slices of one projection, a transposed view and an expanded upstream gradient need no copy by the caller."""
    generator = torch.Generator().manual_seed(3)
    packed = (torch.randn(2, 33, 2, 6 * 32, generator=generator) * 0.2).requires_grad_()
    views = list(packed.chunk(6, dim=-1))
    views[3] = views[3].transpose(1, 2).contiguous().transpose(1, 2)
    grads = []
    for backend in ("cpu", "naive"):
        y, last = wkv7(*views, backend=backend)
        grads.append(torch.autograd.grad(y.sum() + last.mT.square().sum(), packed)[0])
    assert error(*grads) <= LIMIT


@pytest.mark.parametrize("x", [-40.0, 0.0, 40.0])
def test_extreme_decays(x):
    """No decay, and the strongest (0.545 per token), for longer than a checkpoint interval."""
    inputs, state = make(1, 130, 1, 64), make_state(1, 1, 64)
    with torch.no_grad():
        inputs[1].fill_(x)
    values, references = run(inputs, state), run(inputs, state, backend="naive")
    if abs(x) == 40:  # sigmoid's slope vanishes there: w's own gradient is zero up to float32's range
        assert torch.isfinite(values[3]).all() and values[3].abs().max() <= 1e-6
        values[3] = references[3]
    assert_close(values, references)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 0, 19, 19, 20])])
def test_every_output_element_is_written(starts):
    """With uninitialised memory filled by NaN nothing may stay NaN (tail tokens, empty segments)."""
    inputs, state = make(1, 20, 1, 64), make_state(1 if starts is None else 4, 1, 64)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        values = run(inputs, state, starts)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert all(torch.isfinite(value).all() for value in values)


def test_nan_shows_and_stays_in_its_head():
    """A diverged head must be visible, and must not spoil the others."""
    inputs = [x.detach() for x in make(1, 20, 2, 64)]
    inputs[1][0, 7, 0, 3] = math.nan
    y, last = wkv7(*inputs, backend="cpu")
    assert torch.isfinite(y[:, :7]).all() and torch.isfinite(y[:, :, 1]).all() and torch.isfinite(last[:, 1]).all()
    assert y[:, 7:, 0].isnan().all() and last[:, 0].isnan().any()
    inputs = [x.detach() for x in make(1, 20, 2, 64)]
    inputs[3][0, 7, 0, 3] = math.inf
    y, _ = wkv7(*inputs, backend="cpu")
    assert not torch.isfinite(y[0, 7, 0, 3]) and torch.isfinite(y[:, :, 1]).all()


def test_only_what_is_asked_for_is_kept():
    """Inference keeps nothing for backward; a frozen input gets no gradient."""
    inputs, state = make(1, 4, 1, 32), make_state(1, 1, 32)
    with torch.no_grad():
        assert not wkv7(*inputs, state=state)[0].requires_grad
    inputs[0] = inputs[0].detach()
    y, _ = wkv7(*inputs, state=state)
    y.sum().backward()
    assert inputs[0].grad is None and inputs[1].grad is not None and state.grad is not None


def test_state_of_another_dtype_is_converted_and_receives_its_gradient():
    inputs = make(1, 4, 1, 32)
    state = make_state(1, 1, 32).detach().to(torch.bfloat16).requires_grad_()
    y, last = wkv7(*inputs, state=state)
    y.sum().backward()
    assert last.dtype == torch.float32 and state.grad.dtype == torch.bfloat16


def test_operator_refuses_offsets_outside_its_memory():
    """Called by hand with wrong segment starts the operator must raise, not read foreign memory."""
    flat = [x.detach().flatten(0, 1) for x in make(1, 4, 1, 32)]
    for starts in ([0, 5], [0, 3], [1, 4], [0, 4, 2, 4], [0, -1, 4]):
        state = torch.zeros(len(starts) - 1, 1, 32, 32)
        with pytest.raises(RuntimeError, match="starts"):
            library("wkv7").forward(flat, state, torch.tensor(starts), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__(2, x[2][:, :2]), r"k has shape \(1, 2, 2, 32\)"),
        (lambda x: x.__setitem__(4, x[4].bfloat16()), "a is torch.bfloat16"),
        (lambda x: x.__setitem__(0, x[0][0]), "r must have shape"),
        (lambda x: x.__setitem__(0, x[0].half()), "r must be bfloat16"),
        (lambda x: x.__setitem__(5, x[5].to("meta")), "b is on meta"),
    ],
)
def test_wrong_input_is_named(change, message):
    inputs = [x.detach() for x in make(1, 3, 2, 32)]
    change(inputs)
    with pytest.raises(ValueError, match=message):
        wkv7(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": torch.zeros(1, 2, 32, 16)}, "state has shape"),
        ({"state": torch.zeros(1, 2, 32, 32, dtype=torch.int64)}, "state must be a floating-point"),
        ({"starts": torch.tensor([0, 3], dtype=torch.int32)}, "starts must be int64"),
        ({"starts": torch.tensor([0, 2])}, "starts must rise from 0 to the 3 tokens"),
        ({"starts": torch.tensor([0, 3, 1, 3])}, "starts must rise"),
        ({"starts": torch.tensor([0, 1, 3]), "state": torch.zeros(1, 2, 32, 32)}, "state has shape"),
        ({"backend": "fast"}, "wkv7 has no backend 'fast'"),
    ],
)
def test_wrong_option_is_named(options, message):
    inputs = [x.detach() for x in make(1, 3, 2, 32)]
    with pytest.raises(ValueError, match=message):
        wkv7(*inputs, **options)


def test_packed_rows_need_batch_size_one():
    with pytest.raises(ValueError, match="starts needs packed rows"):
        wkv7(*make(2, 3, 1, 32), starts=torch.tensor([0, 3]))
