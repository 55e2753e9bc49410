"""The recurrences of RWKV-4, 5, 6 and 7: the plain loop against the formula and finite differences, the C++ kernels
against the plain loop in float64. How they are called is tested in test_recurrence_calls.py.

Errors are RMS(difference) / RMS(reference), per tensor.
"""

import math

import numpy as np
import pytest
import torch

from rwkv_rlhf.ops import judge
from rwkv_rlhf.ops.backends import choose
from rwkv_rlhf.ops.build import BuildError
from rwkv_rlhf.ops.cpu import library
from rwkv_rlhf.ops.judge import RECURRENCES, make_inputs, make_state, meaning, results

# one group, since two processes would wait for the same compilers
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("recurrences")]

LIMIT = 2e-6


@pytest.fixture(params=list(RECURRENCES))
def op(request):
    """Each recurrence, its kernel compiled; these tests judge little without it."""
    try:
        library(request.param)
    except BuildError as error:
        pytest.skip(f"the kernel cannot be built here: {error}")
    return request.param


def doubled(inputs, state):
    return [x.detach().double().requires_grad_() for x in inputs], state.detach().double().requires_grad_()


def exact(op, inputs, state, starts=None):
    """Values and gradients by the plain loop in float64."""
    return results(op, *doubled(inputs, state), starts, backend="naive")


def assert_close(values, references, limit=LIMIT):
    far = {name: error for name, error in judge.errors(values, references).items() if not error <= limit}
    assert not far


def set_input(op, inputs, name, value):
    with torch.no_grad():
        inputs[RECURRENCES[op].names.index(name)].copy_(torch.as_tensor(value))


def published(op, inputs, state):
    """y and what the final state means, in numpy, for one row: every token's weight on every later one written out."""
    x = {name: value.detach().numpy() for name, value in zip(RECURRENCES[op].names, inputs, strict=True)}
    x = {name: value[0] if name in RECURRENCES[op].tokens else value for name, value in x.items()}
    state, y = state.detach().numpy()[0], np.zeros_like(x["v"])
    T = len(y)
    if op == "wkv4":  # sums over earlier tokens of e^(-(t-1-s) exp(w) + k_s), and over the tokens v times that
        p0, q0 = state[:, 0] * np.exp(state[:, 2]), state[:, 1] * np.exp(state[:, 2])

        def sums(t):
            far = np.exp(-np.exp(x["w"]) * t)
            near = [np.exp(-np.exp(x["w"]) * (t - 1 - s) + x["k"][s]) for s in range(t)]
            return far * p0 + sum(e * v for e, v in zip(near, x["v"], strict=False)), far * q0 + sum(near)

        for t in range(T):
            now = np.exp(x["u"] + x["k"][t])
            y[t] = (sums(t)[0] + now * x["v"][t]) / (sums(t)[1] + now)
        return y, np.stack(sums(T), axis=-1)
    S = state.copy()
    for t in range(T):
        for h in range(S.shape[0]):
            r, k, v, w = (x[name][t, h] if x[name].ndim == 3 else x[name][h] for name in "rkvw")
            if op == "wkv7":
                a, b, decay = x["a"][t, h], x["b"][t, h], np.exp(-np.exp(-np.log1p(np.exp(-w)) - 0.5))
                S[h] = S[h] * decay + np.outer(S[h] @ a, b) + np.outer(v, k)
                y[t, h] = S[h] @ r
            else:
                y[t, h] = (S[h] + np.outer(v, x["u"][h] * k)) @ r
                S[h] = S[h] * np.exp(-np.exp(w)) + np.outer(v, k)
    return y, S


def test_plain_loop_is_the_published_recurrence(op):
    """A loop that is wrong would pass every comparison with itself."""
    inputs, state = make_inputs(op, (1, 5, 2, 4), torch.float64), make_state(op, 1, 2, 4, torch.float64)
    y, last = RECURRENCES[op].function(*inputs, state=state, backend="naive")
    for value, reference in zip((y[0], meaning(op, last)[0]), published(op, inputs, state), strict=True):
        np.testing.assert_allclose(value.detach().numpy(), reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 0, 2, 3])])
def test_plain_loop_gradients_match_finite_differences(op, starts):
    """Of every input and the initial state, also through the final state, also packed."""
    inputs = make_inputs(op, (1, 3, 1, 3), torch.float64)
    state = make_state(op, 1 if starts is None else 3, 1, 3, torch.float64)

    def outputs(*x):
        y, last = RECURRENCES[op].function(*x, starts=starts, backend="naive")
        return y, meaning(op, last)

    assert torch.autograd.gradcheck(outputs, (*inputs, state))


@pytest.mark.parametrize(
    ("size", "tokens"),
    [(64, t) for t in (1, 2, 33, 63, 64, 65, 130)] + [(32, t) for t in (1, 16, 65, 130)] + [(128, t) for t in (2, 65)],
)
def test_kernel_values_and_gradients_equal_the_plain_loop(op, size, tokens):
    """Within, at and beyond each block and checkpoint."""
    inputs, state = make_inputs(op, (2, tokens, 2, size)), make_state(op, 2, 2, size)
    assert_close(results(op, inputs, state, backend="cpu"), exact(op, inputs, state))


@pytest.mark.parametrize("channels", [1, 7, 77])
def test_rwkv4_of_any_width(channels):
    """Channels that fill no register, no block of channels."""
    inputs, state = make_inputs("wkv4", (2, 9, 1, channels)), make_state("wkv4", 2, 1, channels)
    assert_close(results("wkv4", inputs, state, backend="cpu"), exact("wkv4", inputs, state))


@pytest.mark.parametrize("threads", [2, 7])
def test_result_does_not_depend_on_the_number_of_threads(op, threads):
    """Not a bit, sums over rows included; of wkv7, whose threads share a head's values, up to rounding."""
    inputs, state = make_inputs(op, (3, 70, 1, 64)), make_state(op, 3, 1, 64)
    alone = results(op, inputs, state, backend="cpu")
    torch.set_num_threads(threads)
    several = results(op, inputs, state, backend="cpu")
    assert_close(several, alone, 1e-6 if op == "wkv7" else 0)
    assert_close(results(op, inputs, state, backend="cpu"), several, 0)


def test_packed_rows_equal_separate_runs(op):
    """Segments of 0, 70, 1, 0, 16 and 0 tokens, each with its own state: an empty one returns its state as it was."""
    lengths = [0, 70, 1, 0, 16, 0]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inputs, state = make_inputs(op, (1, sum(lengths), 2, 64)), make_state(op, len(lengths), 2, 64)
    assert_close(results(op, inputs, state, starts, "cpu"), exact(op, inputs, state, starts))
    run, count = RECURRENCES[op].function, len(RECURRENCES[op].tokens)
    flat, state = [x.detach() for x in inputs], state.detach()
    all_y, all_last = run(*flat, state=state, starts=starts, backend="cpu")
    for i, length in enumerate(lengths):
        here = slice(starts[i], starts[i] + length)
        part = [x[:, here] if n < count else x for n, x in enumerate(flat)]
        y, last = run(*part, state=state[i : i + 1], backend="cpu")
        assert torch.equal(all_y[:, here], y) and torch.equal(all_last[i : i + 1], last)
        if length == 0:
            assert torch.equal(last, state[i : i + 1])


@pytest.mark.parametrize("cut", [1, 37, 64])
def test_carried_state_equals_one_long_pass(op, cut):
    """Values, and the gradient that flows back through the carried state: infinite context is this."""
    inputs, state = make_inputs(op, (2, 100, 1, 32)), make_state(op, 2, 1, 32)
    run, count = RECURRENCES[op].function, len(RECURRENCES[op].tokens)

    def parts(begin, end):
        return [x[:, begin:end] if n < count else x for n, x in enumerate(inputs)]

    y1, middle = run(*parts(0, cut), state=state, backend="cpu")
    y2, last = run(*parts(cut, 100), state=middle, backend="cpu")
    outputs = torch.cat([y1, y2], dim=1), meaning(op, last)
    reference = exact(op, inputs, state)
    generator = torch.Generator().manual_seed(9)  # the weights of judge.results
    loss = sum((x * torch.randn(x.shape, generator=generator).bfloat16().float()).sum() for x in outputs)
    values = [*(x.detach() for x in outputs), *torch.autograd.grad(loss, [*inputs, state])]
    assert_close(dict(zip(reference, values, strict=True)), reference)


def test_no_tokens_at_all_returns_the_state_and_its_gradient(op):
    """If this breaks, an empty segment of a packed row loses the state that it carries."""
    inputs, state = make_inputs(op, (2, 0, 1, 32)), make_state(op, 2, 1, 32)
    y, last = RECURRENCES[op].function(*inputs, state=state, backend="cpu")
    weight = torch.randn(last.shape)
    *grads, dstate = torch.autograd.grad((last * weight).sum(), [*inputs, state])
    assert y.shape == inputs[0].shape and torch.equal(last, state) and torch.equal(dstate, weight)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("size", [32, 64])
def test_bfloat16_in_and_out(op, size):
    """Inputs, y and gradients are rounded to bfloat16, nothing else is: state and arithmetic stay float32."""
    inputs, state = make_inputs(op, (1, 65, 2, size), torch.bfloat16), make_state(op, 1, 2, size)
    values, references = results(op, inputs, state, backend="cpu"), exact(op, inputs, state)
    rounded = {"y", *(f"d{name}" for name in RECURRENCES[op].tokens)}
    assert {name for name, value in values.items() if value.dtype == torch.bfloat16} == rounded
    for name, value in values.items():
        reference = references[name].to(torch.bfloat16) if name in rounded else references[name]
        assert judge.error(value, reference) <= (1e-3 if name in rounded else LIMIT), name


def test_strided_inputs_and_gradients(op):
    """Slices of one projection, a transposed view and an expanded upstream gradient need no copy by the caller."""
    count, vectors = len(RECURRENCES[op].tokens), len(RECURRENCES[op].vectors)
    axes = (64,) if op == "wkv4" else (2, 32)
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(2, 33, *axes[:-1], count * axes[-1], generator=generator) * 0.2
    wide = torch.randn(*axes[:-1], 2 * axes[-1], generator=generator)
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("naive", torch.float64)):
        leaf, side = packed.to(dtype).requires_grad_(), wide.to(dtype).requires_grad_()
        views = [*leaf.chunk(count, dim=-1), *side.chunk(2, dim=-1)[:vectors]]
        views[1] = views[1].transpose(1, 2).contiguous().transpose(1, 2)
        y, last = RECURRENCES[op].function(*views, backend=backend)
        loss = y.sum() + meaning(op, last).mT.square().sum()
        grads.append(torch.autograd.grad(loss, [leaf, side] if vectors else [leaf]))
    for value, reference in zip(*grads, strict=True):
        assert judge.error(value, reference) <= LIMIT


DECAYS = dict.fromkeys(("wkv4", "wkv5", "wkv6"), (-20.0, 2.0, 5.0, 6.9)) | {"wkv7": (-40.0, 0.0, 40.0)}


@pytest.mark.parametrize(("op", "w"), [(op, w) for op, values in DECAYS.items() for w in values], indirect=["op"])
def test_extreme_decays(op, w):
    """None, a fast one, one of exactly 0 (w = 5, 6.9), wkv7's bounds, for longer than a checkpoint interval: every
    gradient stays exact, also that of w, which falls with the decay."""
    inputs, state = make_inputs(op, (1, 130, 1, 64)), make_state(op, 1, 1, 64)
    set_input(op, inputs, "w", w)
    values, references = results(op, inputs, state, backend="cpu"), exact(op, inputs, state)
    if op == "wkv7" and abs(w) == 40:  # sigmoid's slope vanishes there: w's own gradient is zero up to float32's range
        assert values["dw"].abs().max() <= 1e-6
        values["dw"] = references["dw"]
    assert_close(values, references)


@pytest.mark.parametrize("op", ["wkv4", "wkv5", "wkv6"], indirect=True)
def test_decays_of_all_speeds_side_by_side(op):
    """A decay of 0 beside one of 1, in one group of tokens and one register; e^w may overflow (w = 100)."""
    inputs, state = make_inputs(op, (2, 70, 1, 64)), make_state(op, 2, 1, 64)
    index = RECURRENCES[op].names.index("w")
    choice = torch.tensor([-100.0, -20.0, -1.0, 2.0, 3.0, 5.0, 6.9])
    generator = torch.Generator().manual_seed(2)
    set_input(op, inputs, "w", choice[torch.randint(len(choice), inputs[index].shape, generator=generator)])
    assert_close(results(op, inputs, state, backend="cpu"), exact(op, inputs, state))
    set_input(op, inputs, "w", 100.0)
    values = results(op, inputs, state, backend="cpu")
    assert all(value.isfinite().all() for value in values.values()) and not values["dw"].any()


def test_slow_channels_of_rwkv4_do_not_drift():
    """600 additions of one log decay in float32 round the same way each time: 5e-5 in the plain float32 loop."""
    inputs, state = make_inputs("wkv4", (1, 600, 1, 16)), make_state("wkv4", 1, 1, 16)
    set_input("wkv4", inputs, "w", -5.3)
    assert_close(results("wkv4", inputs, state, backend="cpu"), exact("wkv4", inputs, state))


@pytest.mark.parametrize("high", [80.0, -80.0])
def test_large_keys_of_rwkv4_do_not_overflow(high):
    """e^k leaves float32's range; weights are ratios and do not. From the empty state, which has no scale yet."""
    inputs, state = make_inputs("wkv4", (1, 20, 1, 32)), make_state("wkv4", 1, 1, 32)
    with torch.no_grad():
        inputs[0][:, ::3] += high
        state.copy_(torch.tensor([0.0, 0.0, -1e38]))
    runs = []
    for x in (inputs, doubled(inputs, state)[0]):
        y, _ = RECURRENCES["wkv4"].function(*x, backend="cpu" if x is inputs else "naive")
        runs.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for value, reference in zip(*runs, strict=True):
        assert judge.error(value, reference) <= LIMIT


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 0, 19, 19, 20])])
def test_every_output_element_is_written(op, starts):
    """With uninitialised memory filled by NaN nothing may stay NaN (tail tokens, empty segments)."""
    inputs, state = make_inputs(op, (1, 20, 1, 64)), make_state(op, 1 if starts is None else 4, 1, 64)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        values = results(op, inputs, state, starts, "cpu")
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert all(value.isfinite().all() for value in values.values())


BROKEN = [(op, name) for op, about in RECURRENCES.items() for name in about.tokens if name in "kvw"]


@pytest.mark.parametrize(("op", "name"), BROKEN, indirect=["op"])
def test_nan_shows_and_stays_in_its_head(op, name):
    """A diverged head (wkv4: channel) must be visible from its token on, and must not spoil the others."""
    inputs = [x.detach() for x in make_inputs(op, (1, 20, 2, 64))]
    broken = inputs[RECURRENCES[op].names.index(name)]
    broken[(0, 7, 3) if op == "wkv4" else (0, 7, 0, 3)] = math.inf if name == "v" else math.nan
    y, last = RECURRENCES[op].function(*inputs, backend="cpu")
    mine, others = (slice(3, 4), slice(4, None)) if op == "wkv4" else (slice(0, 1), slice(1, None))
    assert y[:, :7].isfinite().all() and y[:, :, others].isfinite().all() and last[:, others].isfinite().all()
    first = 8 if op == "wkv6" and name == "w" else 7  # the decay of token 7 first shows in token 8
    assert all(not y[0, t, mine].isfinite().all() for t in range(first, 20)) and not last[:, mine].isfinite().all()


def test_half_precision_costs_what_rounding_its_ends_does(op):
    """If this breaks, --precision fp16 falls back to plain loops where Triton does not run, or loses digits inside."""
    where = torch.device("cpu")
    inputs, state = make_inputs(op, (2, 70, 2, 32), torch.float16, where), make_state(op, 2, 2, 32)
    assert choose(op, where, torch.float16, tuple(inputs[0].shape))[0] == "cpu"
    values = results(op, inputs, state)
    assert all(values[name].dtype == torch.float16 for name in values if name == "y")
    assert_close(values, exact(op, inputs, state), 2e-3)
