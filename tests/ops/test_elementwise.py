"""The element-wise groups of RWKV-7: formulas written out token by token judge the twins, the twins the kernels."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rwkv_rlhf.ops import elementwise as elementwise
from rwkv_rlhf.ops import elementwise_naive as elementwise_naive
from rwkv_rlhf.ops.build import BuildError
from rwkv_rlhf.ops.cpu import library

EPS = 64e-5
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def kernels():
    """Skip where there is no compiler; then users run the twins."""
    try:
        library("elementwise")
    except BuildError as error:
        pytest.skip(f"kernels cannot be built: {error}")


@pytest.fixture
def poisoned():
    """Fill uninitialised memory with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(op: str, batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype, segments: int = 0):
    """Tensors of one call in argument order; small vectors float32 unless everything is float64."""
    generator = torch.Generator().manual_seed(1000 * len(op) + tokens)
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    width = heads * size

    def rows(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *(shape or (width,)), generator=generator).to(dtype).requires_grad_()

    def vector(*shape: int) -> Tensor:
        return torch.randn(*(shape or (width,)), generator=generator).to(vector_dtype).requires_grad_()

    if op == "token_mix":
        return rows(), vector(segments or batch, width), vector(6, width)
    if op == "value_gate":
        return rows(), rows(), vector(), rows()
    if op == "delta_keys":
        return rows(), vector(), vector(), vector(), rows()
    if op == "gated_norm":
        return rows(heads, size), rows(), rows(), rows(), vector(heads, size), vector(), vector(), rows()
    return (rows(),)


def call(module, op: str, tensors, heads: int, starts: Tensor | None = None, **backend) -> tuple[Tensor, ...]:
    if op == "token_mix":
        x, last, mixes = tensors
        return module.token_mix(x, last, starts=starts, mixes=mixes, **backend)
    if op == "delta_keys":
        return module.delta_keys(*tensors, heads, **backend)
    return (result,) if torch.is_tensor(result := getattr(module, op)(*tensors, **backend)) else result


def run(module, op: str, tensors, heads: int, starts: Tensor | None = None, **backend) -> list[Tensor]:
    """Values and gradients for every input, the gradients of fixed random weights on the outputs."""
    outs = call(module, op, tensors, heads, starts, **backend)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
    return [*outs, *torch.autograd.grad(outs, tensors, weights)]


def distance(a: Tensor, b: Tensor) -> float:
    """RMS of the difference relative to the RMS of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written_out(op: str, tensors, heads: int, starts: Tensor | None = None) -> list[Tensor]:
    """The published formulas with Python numbers, token by token and channel by channel."""
    values = [t.detach().flatten(2) if t.dim() == 4 else t.detach() for t in tensors]
    batch, tokens, width = values[0].shape
    size = width // heads
    outs = [torch.zeros(batch, tokens, width, dtype=torch.float64) for _ in range({"token_mix": 6}.get(op, 3))]
    for b in range(batch):
        for t in range(tokens):
            at = [v[b, t].tolist() if v.dim() == 3 else v.flatten().tolist() for v in values]
            for h in range(heads):
                span = range(h * size, (h + 1) * size)
                if op == "delta_keys":
                    k, k_k, _, _, _ = at
                    length = math.sqrt(sum((k[c] * k_k[c]) ** 2 for c in span))
                if op == "gated_norm":
                    y, r, k, _, r_k, _, _, _ = at
                    mean = sum(y[c] for c in span) / size
                    deviation = math.sqrt(sum((y[c] - mean) ** 2 for c in span) / size + EPS)
                    bonus = sum(r[c] * k[c] * r_k[c] for c in span)
                for c in span:
                    if op == "token_mix":
                        begins = [0] if starts is None else starts.tolist()
                        row = b if starts is None else max(s for s, at_ in enumerate(begins[:-1]) if at_ <= t)
                        first = t == begins[row] if starts is not None else t == 0
                        before = values[1][row, c] if first else values[0][b, t - 1, c]
                        for m, out in enumerate(outs):
                            out[b, t, c] = at[0][c] + (before - at[0][c]) * values[2][m, c]
                    elif op == "value_gate":
                        v, v_first, v0, v12 = (a[c] for a in at)
                        outs[0][b, t, c] = v + (v_first - v) * sigmoid(v0 + v12)
                    elif op == "delta_keys":
                        k, k_k, k_a, a0, a12 = (a[c] for a in at)
                        a = sigmoid(a0 + a12)
                        unit = k * k_k / length
                        outs[0][b, t, c], outs[1][b, t, c], outs[2][b, t, c] = k * (1 + (a - 1) * k_a), -unit, unit * a
                    elif op == "gated_norm":
                        y, _, _, v, _, weight, bias, g = (a[c] for a in at)
                        outs[0][b, t, c] = ((y - mean) / deviation * weight + bias + bonus * v) * g
                    else:
                        outs[0][b, t, c] = max(at[0][c], 0.0) ** 2
    return outs


OPS = ("token_mix", "value_gate", "delta_keys", "gated_norm", "relu_squared")


@pytest.mark.parametrize("op", OPS)
def test_twins_are_the_published_formulas(op: str):
    """A twin that is wrong would pass its error on to every kernel judged by it."""
    starts = torch.tensor([0, 0, 2, 2, 5, 5]) if op == "token_mix" else None
    tensors = inputs(op, 1, 5, 2, 4, torch.float64, segments=5)
    for out, expected in zip(call(elementwise_naive, op, tensors, 2, starts), written_out(op, tensors, 2, starts)):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: call(elementwise_naive, op, t, 2, starts), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 32), (2, 3, 2, 64), (1, 97, 6, 128), (3, 70, 5, 8), (1, 200, 1, 33)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_twins(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, kernels, poisoned):
    """Training with kernels would differ from training without, or use memory nobody wrote."""
    tensors = inputs(op, *shape, dtype)
    fast = run(elementwise, op, tensors, shape[2], backend="cpu")
    slow = run(elementwise_naive, op, tensors, shape[2])
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert distance(a, b) < LIMITS[dtype]


@pytest.mark.parametrize("backend", ["cpu", "naive"])
@pytest.mark.parametrize("with_last", [True, False])
def test_packed_segments_equal_separate_rows(backend: str, with_last: bool, kernels, poisoned):
    """A packed document would see its neighbour's last token, or its state would get another row's gradient."""
    bounds = [0, 0, 1, 34, 34, 70, 70]
    starts = torch.tensor(bounds)
    x, last, mixes = inputs("token_mix", 1, bounds[-1], 3, 32, torch.float32, segments=len(bounds) - 1)
    given = (x, last, mixes) if with_last else (x, mixes)
    weights = torch.randn(6, *x.shape)
    outs = elementwise.token_mix(x, last if with_last else None, starts, mixes, backend=backend)
    packed = [*outs, *torch.autograd.grad(outs, given, list(weights))]

    parts = []
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            row = last[s : s + 1] if with_last else None
            parts.append(elementwise.token_mix(x[:, begin:end], row, None, mixes, backend=backend))
    outs = [torch.cat(pieces, 1) for pieces in zip(*parts)]
    separate = [*outs, *torch.autograd.grad(outs, given, list(weights))]
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if with_last:
        assert not packed[7][[0, 3, 5]].any() and packed[7][[1, 2, 4]].all()


def test_a_carried_token_equals_one_long_row(kernels):
    """Text cut into pieces (infinite context, sampling) would be another text, and its gradient would stop."""
    x, last, mixes = inputs("token_mix", 2, 50, 2, 32, torch.float32)
    whole = torch.stack(elementwise.token_mix(x, last, None, mixes, backend="cpu"))
    halves = [
        torch.stack(elementwise.token_mix(part, before, None, mixes, backend="cpu"))
        for part, before in ((x[:, :20], last), (x[:, 20:], x[:, 19]))
    ]
    torch.testing.assert_close(torch.cat(halves, 2), whole, rtol=0, atol=0)
    weight = torch.randn_like(whole)
    grads = [torch.autograd.grad(out, (x, last, mixes), weight) for out in (whole, torch.cat(halves, 2))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_equal_inputs_give_equal_bits(op: str, kernels):
    """Two runs of one command, or runs with another number of threads, would end in different weights."""
    tensors = inputs(op, 2, 333, 4, 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(elementwise, op, tensors, 4, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs_do_not_change_the_other_gradients(op: str, kernels, poisoned):
    """Under LoRA most tensors are frozen; the trained ones would then get other gradients than in full training."""
    tensors = inputs(op, 1, 40, 2, 32, torch.float32)
    outs = call(elementwise, op, tensors, 2, backend="cpu")
    full = torch.autograd.grad([out.square().sum() for out in outs], tensors)
    for i in range(len(tensors)):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        outs = call(elementwise, op, some, 2, backend="cpu")
        (only,) = torch.autograd.grad([out.square().sum() for out in outs], [some[i]])
        assert torch.equal(only, full[i])


@pytest.mark.parametrize("op", ["token_mix", "delta_keys"])
def test_an_unused_output_counts_as_zero(op: str, kernels, poisoned):
    """A block that uses only some of the outputs would fail in backward, or read uninitialised gradients."""
    tensors = inputs(op, 1, 40, 2, 32, torch.float32)
    for used in range(3):
        fast, slow = (
            torch.autograd.grad(
                call(elementwise, op, tensors, 2, backend=b)[used].square().sum(), tensors, allow_unused=True
            )
            for b in ("cpu", "naive")
        )
        for a, b in zip(fast, slow):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op: str, kernels):
    """Transposed or expanded tensors and gradients would be read in the wrong order."""
    tensors = inputs(op, 2, 12, 2, 32, torch.float32)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in tensors]
    for a, b in zip(
        torch.autograd.grad(sum(o.sum() for o in call(elementwise, op, strided, 2, backend="cpu")), strided),
        torch.autograd.grad(sum(o.sum() for o in call(elementwise, op, tensors, 2, backend="naive")), tensors),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_small_vectors_may_have_the_activations_dtype(kernels):
    """A bfloat16 model without float32 masters would be refused, or get gradients of the wrong dtype."""
    y, r, k, v, r_k, weight, bias, g = inputs("gated_norm", 1, 9, 2, 32, torch.bfloat16)
    narrow = (y, r, k, v, *(t.detach().bfloat16().requires_grad_() for t in (r_k, weight, bias)), g)
    for a, b in zip(
        run(elementwise, "gated_norm", narrow, 2, backend="cpu"), run(elementwise_naive, "gated_norm", narrow, 2)
    ):
        assert a.dtype == torch.bfloat16 and distance(a, b) < 1e-2


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_extreme_values(backend: str, kernels):
    """A saturated gate would overflow, a zero key divide by zero, or a NaN vanish that should stop a run."""
    extreme = torch.tensor([-math.inf, -1e30, -100.0, -60.0, 0.0, 60.0, 1e30, math.inf, math.nan]).repeat(4)[None, None]
    one, zero = torch.ones_like(extreme), torch.zeros_like(extreme)
    gate = elementwise.value_gate(zero, one, torch.zeros(36), extreme, backend=backend)[0, 0, :9]
    torch.testing.assert_close(gate[3:8].double(), torch.tensor([-60.0, 0.0, 60.0, 1e30, math.inf]).double().sigmoid())
    assert (gate[:3] < 1e-37).all() and gate[8].isnan()
    key = torch.zeros(1, 1, 32, requires_grad=True)
    outs = elementwise.delta_keys(key, *torch.ones(3, 32), torch.zeros(1, 1, 32), 1, backend=backend)
    assert not any(out.any() for out in outs)
    assert torch.autograd.grad(outs[0].sum(), key)[0].isfinite().all()
    infinite = torch.tensor([-math.inf, -1.0, 0.0, 2.0, math.inf, math.nan])
    squared = elementwise.relu_squared(infinite, backend=backend)
    torch.testing.assert_close(squared, torch.tensor([0.0, 0.0, 0.0, 4.0, math.inf, math.nan]), equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "naive"])
@pytest.mark.parametrize("op", OPS)
def test_no_tokens_at_all(op: str, backend: str, kernels):
    """An empty prompt would crash."""
    for result in run(elementwise, op, inputs(op, 1, 0, 2, 32, torch.float32), 2, backend=backend):
        assert not result.any()


def test_mistakes_are_named():
    """A tensor of the wrong size would be read beyond its end, or the error would not say which it was."""
    x, _, mixes = inputs("token_mix", 1, 4, 2, 32, torch.float32)
    with pytest.raises(ValueError, match=r"last must be \(1, 64\)"):
        elementwise.token_mix(x, torch.zeros(2, 64), None, mixes)
    with pytest.raises(ValueError, match="starts must rise from 0 to T = 4"):
        elementwise.token_mix(x, None, torch.tensor([0, 3, 2, 4]), mixes)
    with pytest.raises(ValueError, match="need B = 1"):
        elementwise.token_mix(x.repeat(2, 1, 1), None, torch.tensor([0, 4]), mixes)
    with pytest.raises(ValueError, match=r"v_first is torch\.bfloat16"):
        elementwise.value_gate(x, x.bfloat16(), torch.zeros(64), x)
    with pytest.raises(ValueError, match="3 heads do not divide"):
        elementwise.delta_keys(x, *torch.zeros(3, 64), x, 3)
    with pytest.raises(ValueError, match="r_k"):
        elementwise.gated_norm(x.view(1, 4, 2, 32), x, x, x, torch.zeros(64), torch.zeros(64), torch.zeros(64), x)
