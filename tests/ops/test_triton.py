"""The Triton kernels of the recurrences, in Triton's interpreter on the CPU, against the plain loop in float64.

16-bit inputs are multiplied as a GPU does it: operands rounded to them, and to tf32 where the kernels ask for that. The
limits are those of a tensor-core RWKV-7 whose triangular factors are products in tf32, plus the rounding of a result
to bfloat16 (1.7e-3). Errors are RMS(difference) / RMS(reference), per tensor.
"""

import pytest
import torch

from rwkv_rlhf.ops import backends, compiling, elementwise, judge, logprob, recurrence
from rwkv_rlhf.ops.judge import RECURRENCES, make_inputs, make_state, results

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of infinities that are masked
]

from rwkv_rlhf.ops.triton import backend as way  # noqa: E402
from rwkv_rlhf.ops.triton import launch  # noqa: E402
from rwkv_rlhf.ops.triton.recurrences import MatrixKernel, Tiles  # noqa: E402

if not launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)

EXACT = 2e-6
CLAMPED = 1e-4  # WKV-5 and 6 cut log decays at -10, which leaves 5e-5 of a state
# What tensor cores cost. y, dr, dk, dv: 2.8e-3, da, db: 4e-3, dlogw: 1.6e-3 (KERNELS, accuracy budget), each beside
# the rounding of the result; states are not rounded.
HALF = {"da": 4.5e-3, "db": 4.5e-3, "dw": 3e-3}


@pytest.fixture
def cut(monkeypatch):
    """cut(Tiles(...)): all matrix-state kernels of the test run with these tiles."""

    def use(wanted):
        monkeypatch.setattr(recurrence, "kernel", lambda op, *_: MatrixKernel(op, wanted))

    return use


def run(op, inputs, state, starts=None):
    return results(op, inputs, state, starts, backend="triton")


def exact(op, inputs, state, starts=None):
    wide = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    return results(op, wide[:-1], wide[-1], starts, backend="naive")


def far(op, inputs, state, limits, starts=None):
    """The tensors that are further off than `limits` (a number, or by name with 3e-3 for the others)."""
    found = judge.errors(run(op, inputs, state, starts), exact(op, inputs, state, starts))
    limit = limits.get if isinstance(limits, dict) else lambda name, default: limits
    return {name: error for name, error in found.items() if not error <= limit(name, 3e-3)}


def exact_limit(op):
    return CLAMPED if op in ("wkv5", "wkv6") else EXACT


@pytest.mark.parametrize("op", list(RECURRENCES))
def test_values_and_gradients_equal_the_plain_loop(op):
    """Two groups of 64 tokens, the last chunk not full; with a first state and through the last one."""
    inputs, state = make_inputs(op, (1, 70, 2, 32)), make_state(op, 1, 2, 32)
    assert not far(op, inputs, state, exact_limit(op))


@pytest.mark.slow
@pytest.mark.parametrize("op", list(RECURRENCES))
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 130])
def test_any_number_of_tokens(op, tokens):
    """Within, at and beyond each chunk and group, two rows."""
    inputs, state = make_inputs(op, (2, tokens, 1, 32)), make_state(op, 2, 1, 32)
    assert not far(op, inputs, state, exact_limit(op))


@pytest.mark.parametrize("op", list(RECURRENCES))
def test_packed_rows(op):
    """Segments of 0, 33, 1, 0 and 6 tokens, each with its own state; an empty one returns its state as it was."""
    starts = torch.tensor([0, 0, 33, 34, 34, 40])
    inputs, state = make_inputs(op, (1, 40, 1, 32)), make_state(op, 5, 1, 32)
    assert not far(op, inputs, state, exact_limit(op), starts)
    _, last = RECURRENCES[op].function(*inputs, state=state, starts=starts, backend="triton")
    assert torch.equal(last[0], state[0]) and torch.equal(last[3], state[3])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_stay_within_the_budget_of_tensor_cores(op, dtype):
    """If this breaks, bf16 training on a GPU learns from gradients with errors of percents."""
    inputs, state = make_inputs(op, (1, 70, 2, 32), dtype), make_state(op, 1, 2, 32)
    values = run(op, inputs, state)
    rounded = {"y", *(f"d{name}" for name in RECURRENCES[op].tokens)}
    assert {name for name, x in values.items() if x.dtype == dtype} == rounded
    found = judge.errors(values, exact(op, inputs, state))
    assert not {name: error for name, error in found.items() if not error <= HALF.get(name, 3e-3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "size", "tiles"),
    [
        ("wkv7", 64, Tiles(16, 64, 4)),
        ("wkv7", 64, Tiles(16, 32, 4)),
        ("wkv7", 64, Tiles(32, 32, 4)),
        ("wkv7", 128, Tiles(16, 64, 8)),
        ("wkv6", 64, Tiles(16, 32, 4)),
        ("wkv5", 64, Tiles(16, 32, 4)),
        ("wkv5", 128, Tiles(16, 64, 8)),
    ],
)
def test_every_cut_into_tiles(cut, op, size, tiles):
    """Value channels over several programs, longer chunks, every head size."""
    cut(tiles)
    inputs, state = make_inputs(op, (1, 40, 1, size)), make_state(op, 1, 1, size)
    assert not far(op, inputs, state, exact_limit(op))


def test_equal_inputs_give_equal_bits(cut):
    """No sum depends on which program comes first: gradients by key channel from two programs."""
    cut(Tiles(16, 32, 4))
    inputs, state = make_inputs("wkv7", (1, 20, 1, 64)), make_state("wkv7", 1, 1, 64)
    first, second = run("wkv7", inputs, state), run("wkv7", inputs, state)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", ["wkv5", "wkv6"])
def test_decays_of_all_speeds_side_by_side(op):
    """From none to exactly 0, in neighbouring channels and tokens, beyond where they are cut; all finite and close."""
    inputs, state = make_inputs(op, (1, 35, 1, 32)), make_state(op, 1, 1, 32)
    w = inputs[RECURRENCES[op].names.index("w")]
    choice = torch.tensor([-100.0, -20.0, -1.0, 2.0, 3.0, 5.0, 6.9, 100.0])
    with torch.no_grad():
        w.copy_(choice[torch.randint(len(choice), w.shape, generator=torch.Generator().manual_seed(2))])
    assert not far(op, inputs, state, 2e-4)


@pytest.mark.parametrize("w", [3.0, 100.0])
def test_a_decay_that_is_cut_has_no_gradient(w):
    """e^-20 and 0: what is left of the state is 5e-5, and nothing can be learnt about the decay."""
    inputs, state = make_inputs("wkv6", (1, 18, 1, 32)), make_state("wkv6", 1, 1, 32)
    with torch.no_grad():
        inputs[3].fill_(w)
    values = run("wkv6", inputs, state)
    assert not values["dw"].any() and all(x.isfinite().all() for x in values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_tokens_do_not_break_the_inverse(dtype):
    """One token again and again with full strength and slow decay: powers of A grow to 3432 and would cancel."""
    inputs, state = make_inputs("wkv7", (1, 34, 1, 32), dtype), make_state("wkv7", 1, 1, 32)
    _, w, k, v, a, b = inputs
    with torch.no_grad():
        w.fill_(-9.0)
        b.copy_(-a)
        for x in (k, v, a, b):
            x.copy_(x[:, :1].expand_as(x).clone())
    limits = dict.fromkeys(("y", "final state", "dr", "dk", "dv"), EXACT if dtype == torch.float32 else 4e-3)
    values, references = run("wkv7", inputs, state), exact("wkv7", inputs, state)
    found = judge.errors(values, references)
    assert not {name: found[name] for name, limit in limits.items() if found[name] > limit}


@pytest.mark.slow
def test_slow_channels_of_rwkv4_do_not_drift():
    """Additions of one log decay in float32 round the same way each time."""
    inputs, state = make_inputs("wkv4", (1, 200, 1, 16)), make_state("wkv4", 1, 1, 16)
    with torch.no_grad():
        inputs[2].fill_(-5.3)
    assert not far("wkv4", inputs, state, EXACT)


@pytest.mark.parametrize("high", [80.0, -80.0])
def test_large_keys_of_rwkv4_do_not_overflow(high):
    """e^k leaves float32's range; weights are ratios and do not. From the empty state, which has no scale yet."""
    op, inputs = "wkv4", make_inputs("wkv4", (1, 20, 1, 32))
    with torch.no_grad():
        inputs[0][:, ::3] += high
    runs = []
    for x in (inputs, [x.detach().double().requires_grad_() for x in inputs]):
        y, _ = RECURRENCES[op].function(*x, backend="triton" if x is inputs else "naive")
        runs.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert all(judge.error(value, reference) <= 1e-5 for value, reference in zip(*runs, strict=True))  # 80 +- 4e-6


@pytest.mark.parametrize("op", list(RECURRENCES))
def test_no_tokens_at_all_returns_the_state_and_its_gradient(op):
    """If this breaks, an empty segment of a packed row loses the state that it carries."""
    inputs, state = make_inputs(op, (2, 0, 1, 32)), make_state(op, 2, 1, 32)
    y, last = RECURRENCES[op].function(*inputs, state=state, backend="triton")
    weight = torch.randn(last.shape)
    *grads, dstate = torch.autograd.grad((last * weight).sum(), [*inputs, state])
    assert y.shape == inputs[0].shape and torch.equal(last, state) and torch.equal(dstate, weight)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


# ---------------------------------------------------------------- which backend, and why


CPU = torch.device("cpu")


def refusal(monkeypatch, interpreted=False, **facts):
    """What `--wkv_backend triton` answers on a CPU with the interpreter off."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    with pytest.raises(ValueError, match="triton") as caught:
        backends.choose("wkv7", CPU, facts.get("dtype", torch.float32), (1, 4, 1, facts.get("size", 32)), "triton")
    return str(caught.value)


def test_refusals_are_one_sentence(monkeypatch):
    """If this breaks, --wkv_backend triton fails inside Triton instead of saying what is missing."""
    assert "TRITON_INTERPRET=1" in refusal(monkeypatch)
    assert "head size 96 is not one of" in refusal(monkeypatch, True, size=96)
    assert "no kernel for torch.float64" in refusal(monkeypatch, True, dtype=torch.float64)


@pytest.mark.parametrize(("version", "said"), [("3.2.0", "Triton 3.2.0 is too old; 3.6 is"), (None, "not installed")])
def test_a_triton_that_cannot_serve_is_named(monkeypatch, version, said):
    """If this breaks, a missing or old Triton is a traceback."""

    def found(name):
        if version is None:
            raise way.importlib.metadata.PackageNotFoundError(name)
        return version

    way._missing.cache_clear()
    monkeypatch.setattr(way.importlib.metadata, "version", found)
    try:
        assert said in refusal(monkeypatch, True)
    finally:
        way._missing.cache_clear()


def test_a_machine_without_a_c_compiler_is_told(monkeypatch, tmp_path):
    """If this breaks, `auto` takes Triton on a machine where its first kernel ends in a traceback."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(way, "too_old", lambda device: None)
    monkeypatch.delenv("CC", raising=False)
    asked = "wkv7", gpu, torch.bfloat16, (1, 4, 1, 64)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name == "clang" else None)
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h was not found" in way.Backend().refusal(*asked)
    (tmp_path / "Python.h").touch()
    assert way.Backend().refusal(*asked) is None
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "a C compiler to start kernels, and 'gcc' was not found" in way.Backend().refusal(*asked)


def test_an_old_card_is_told_what_it_can_do(monkeypatch):
    """If this breaks, the owner of an older card does not hear of the backend that runs there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    way.too_old.cache_clear()
    try:
        said = way.Backend().refusal("wkv7", torch.device("cuda", 0), torch.float16, (1, 4, 1, 64))
    finally:
        way.too_old.cache_clear()
    assert "compute capability 7.5" in said and "--wkv_backend cuda runs on it" in said


def test_auto_asks_triton_first_for_16_bit_numbers_on_a_gpu_only():
    """If this breaks, float32 runs lose exactness, or CPU runs crawl in Triton's interpreter."""
    gpu = torch.device("cuda", 0)
    assert backends.candidates("wkv7", gpu, torch.bfloat16) == ["triton", "cuda", "cpu", "naive"]
    assert backends.candidates("wkv7", gpu, torch.float32) == ["cuda", "triton", "cpu", "naive"]
    assert backends.candidates("wkv7", CPU, torch.bfloat16) == ["cuda", "cpu", "naive"]


# ---------------------------------------------------------------- element-wise groups and rows of logits


def compared(function, inputs):
    """Errors of outputs and gradients, of the plain twin in float64 against Triton in the inputs' dtypes."""
    found = []
    for backend in ("triton", "naive"):
        x = [None if t is None else t if t.dtype == torch.int64 else t.detach().clone() for t in inputs]
        if backend == "naive":
            x = [t.double() if t is not None and t.is_floating_point() else t for t in x]
        leaves = [t.requires_grad_() for t in x if t is not None and t.is_floating_point()]
        outputs = function(*x, backend=backend)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        generator = torch.Generator().manual_seed(9)
        weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    assert [x.dtype for x in found[0]] == [
        *(inputs[0].dtype for _ in outputs),
        *(x.dtype for x in inputs if x is not None and x.is_floating_point()),
    ]
    return [judge.error(value, reference) for value, reference in zip(*found, strict=True)]


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


B, T, H, N = 2, 35, 2, 36  # a head that is no power of two, blocks that are not full
C = H * N
GROUPS = {
    "token_mix": (
        lambda x, last, starts, mixes, backend: elementwise.token_mix(x, last, starts, mixes, backend),
        lambda: [noise(B, T, C), noise(B, C), None, noise(6, C)],
    ),
    "token_mix from nothing": (
        lambda x, mixes, backend: elementwise.token_mix(x, None, None, mixes, backend),
        lambda: [noise(B, T, C), noise(2, C)],
    ),
    "token_mix packed": (
        lambda x, last, starts, mixes, backend: elementwise.token_mix(x, last, starts, mixes, backend),
        lambda: [noise(1, 40, C), noise(6, C), torch.tensor([0, 0, 33, 33, 34, 40, 40]), noise(2, C)],
    ),
    "value_gate": (
        elementwise.value_gate,
        lambda: [noise(B, T, C), noise(B, T, C, seed=4), noise(C), noise(B, T, C, seed=5)],
    ),
    "delta_keys": (
        lambda *x, backend: elementwise.delta_keys(*x, H, backend),
        lambda: [noise(B, T, C), noise(C), noise(C, seed=4), noise(C, seed=5), noise(B, T, C, seed=6)],
    ),
    "gated_norm": (
        elementwise.gated_norm,
        lambda: [
            noise(B, T, H, N),
            *(noise(B, T, C, seed=s) for s in (1, 2, 3)),
            noise(H, N),
            noise(C),
            noise(C, seed=4),
            noise(B, T, C, seed=5),
        ],
    ),
    "relu_squared": (elementwise.relu_squared, lambda: [noise(3, 5, 7)]),
    "residual_norm": (
        lambda *x, backend: elementwise.residual_norm(*x, backend=backend),
        lambda: [noise(B, T, C), noise(B, T, C, seed=4), 1 + noise(C), noise(C, seed=5)],
    ),
}


@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_element_wise_groups_equal_their_plain_twins(name, dtype):
    """Values and all gradients; activations in `dtype`, vectors and float32 masters."""
    function, make = GROUPS[name]
    inputs = [x.to(dtype) if x is not None and x.dim() > 2 else x for x in make()]
    assert max(compared(function, inputs)) <= (2e-6 if dtype == torch.float32 else 4e-3)


def test_a_key_of_length_zero_has_finite_gradients():
    """Its direction is unknown: the norm counts as 1e-12, as in the plain twin."""
    zero = torch.zeros(1, 2, 32)
    errors = compared(lambda *x, backend: elementwise.delta_keys(*x, 1, backend), [zero, *torch.ones(3, 32), zero])
    assert all(error <= 2e-6 or error == 0 for error in errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_logits_equal_the_plain_twin(monkeypatch, dtype):
    """Several blocks and a rest of the vocabulary; a row of equal numbers, and one with a single finite number."""
    from rwkv_rlhf.ops.triton import logprob as kernels

    monkeypatch.setattr(kernels, "BLOCK", 64)
    logits = (noise(5, 200) * 4).to(dtype)
    logits[1] = 2.0
    logits[2] = float("-inf")
    logits[2, 150] = 1.0
    targets = torch.tensor([3, 199, 150, 0, 64])
    mine, plain = (logprob.row_stats(x, targets, b) for x, b in ((logits, "triton"), (logits.double(), "naive")))
    for name in ("lse", "target_logit", "max_logit"):
        torch.testing.assert_close(getattr(mine, name).double(), getattr(plain, name), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        mine.logit_sum.double()[[0, 1, 3, 4]], plain.logit_sum[[0, 1, 3, 4]], rtol=1e-5, atol=1e-4
    )
    assert torch.equal(mine.argmax[[0, 2, 3, 4]], plain.argmax[[0, 2, 3, 4]])
    share = torch.linspace(-1, 1, 5)
    found = []
    for x, backend, stats in ((logits, "triton", mine), (logits.double(), "naive", plain)):
        wide = share.to(stats.lse.dtype)
        given = targets, stats.lse, wide, wide / 2, plain.argmax, wide / 4
        found.append(logprob.row_grad_(x.clone(), *given, backend=backend))
    assert found[0].dtype == dtype and judge.error(*found) <= (2e-6 if dtype == torch.float32 else 3e-3)


def test_a_diverged_row_of_logits_shows():
    """If this breaks, a diverged model logs a finite loss."""
    logits = noise(2, 100)
    logits[0, 70] = float("nan")
    stats = logprob.row_stats(logits, torch.tensor([0, 1]), "triton")
    assert stats.lse[0].isnan() and stats.lse[1].isfinite()
