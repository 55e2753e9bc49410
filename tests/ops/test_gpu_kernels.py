"""Kernels of cuda/*.cu without a GPU: run on the CPU by tests/support/kernel_host against the plain loop, and compiled.

Errors are RMS(difference) / RMS(reference) against the plain loop in float64, per tensor.
"""

import contextlib
import re
import shutil

import pytest
import torch

from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.ops import build, gpu
from rwkv_rlhf.ops.calls import LAYOUTS
from rwkv_rlhf.ops.judge import RECURRENCES, errors, make_inputs, make_state, results
from tests.support.kernel_host import HarnessKernel as Harness
from tests.support.kernel_host import Options, as_backend, compiled, functions, harnessed
from tests.support.version_step import step_errors

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 3e-6  # float32
BF16_LIMIT = 5e-3
OPS = [op for op in RECURRENCES if (gpu.SOURCES / f"{op}.cu").is_file() and op in LAYOUTS]
SIZES = [(64, t) for t in (1, 63, 64, 65, 130)] + [(32, t) for t in (2, 65)] + [(128, t) for t in (1, 66)]
WIDE, NARROW = 1, 1000  # processors: few, so that blocks are large; many, so that they are small


@pytest.fixture(scope="module", autouse=True)
def host_compiler():
    """Something must compile the kernels for the CPU."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def doubles(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def run(op, inputs, state, starts=None, **options):
    """Values and gradients of a kernel in the harness, by the path that a GPU takes."""
    with as_backend(op, harnessed(op, Options(**options))):
        return results(op, inputs, state, starts, backend="cuda")


def judged(op, inputs, state, starts=None, **options):
    """The same, and its errors."""
    values = run(op, inputs, state, starts, **options)
    reference = results(op, doubles(inputs), doubles([state])[0], starts, backend="naive")
    return values, errors(values, reference)


def assert_below(found, limit):
    assert all(error <= limit for error in found.values()), found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "tokens"), SIZES)
def test_values_and_gradients_equal_the_plain_loop(op, size, tokens):
    """Any length, any head size, with states; with both sizes of blocks, and approximations as bad as promised."""
    inputs, state = make_inputs(op, (2, tokens, 2, size)), make_state(op, 2, 2, size)
    assert_below(judged(op, inputs, state, processors=WIDE, roughness=1)[1], LIMIT)
    assert_below(judged(op, inputs, state, processors=NARROW, roughness=-1)[1], LIMIT)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_loses_no_more_than_its_rounding(op):
    """Inputs and gradients in bfloat16, the arithmetic in float32."""
    inputs, state = make_inputs(op, (2, 66, 2, 64), torch.bfloat16), make_state(op, 2, 2, 64)
    values, found = judged(op, inputs, state)
    assert_below(found, BF16_LIMIT)
    assert found["final state"] <= LIMIT and values["y"].dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_packed_rows_equal_the_plain_loop(op):
    """Segments of 0, 70, 1, 0, 64 and 0 tokens, each with a state of its own; an empty one returns it as it was."""
    lengths = [0, 70, 1, 0, 64, 0]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inputs, state = make_inputs(op, (1, sum(lengths), 2, 32)), make_state(op, len(lengths), 2, 32)
    for processors in (WIDE, NARROW):
        values, found = judged(op, inputs, state, starts, processors=processors)
        assert_below(found, LIMIT)
    if op != "wkv4":  # the judge turns its state into sums
        for i in (0, 3, 5):
            assert torch.equal(values["final state"][i], state[i])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_order_of_threads_does_not_matter(op, size):
    """To the bit the same if blocks and threads run backwards or shuffled, with warps of 64, or with tensors that
    begin directly after forbidden memory: no barrier is missing, nothing outside is read."""
    inputs, state = make_inputs(op, (1, 67, 2, size), seed=size), make_state(op, 1, 2, size)
    for processors in (WIDE, NARROW):
        first = run(op, inputs, state, processors=processors)
        for options in ({"order": 1, "warp": 64}, {"order": 7, "at_end": False}):
            again = run(op, inputs, state, processors=processors, **options)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_inference_keeps_nothing_and_equals_training(op):
    """Without gradients no checkpoint is written, and no input has to be dense."""
    inputs, state = make_inputs(op, (2, 70, 2, 32)), make_state(op, 2, 2, 32)
    expected = run(op, inputs, state)
    tokens = len(RECURRENCES[op].tokens)
    strided = [torch.stack([x, x], -1)[..., 0] if i < tokens else x for i, x in enumerate(inputs)]
    with as_backend(op, harnessed(op)), torch.no_grad():
        y, _ = RECURRENCES[op].function(*strided, state=state, backend="cuda")
    assert torch.equal(y, expected["y"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("w", [-20.0, 5.0])
def test_extreme_decays_stay_exact(op, w):
    """A channel that forgets everything at once, or nothing ever: no NaN, and gradients of the plain loop."""
    inputs, state = make_inputs(op, (1, 130, 1, 32)), make_state(op, 1, 1, 32)
    names = RECURRENCES[op].names
    inputs[names.index("w")].data[..., ::2] = w
    assert_below(judged(op, inputs, state, roughness=1)[1], 2e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_of_every_version_runs_through_the_kernels(version):
    """If this breaks, training on a GPU learns something else than on a CPU, or not at all."""
    with contextlib.ExitStack() as stack:
        for op in RECURRENCES:
            stack.enter_context(as_backend(op, harnessed(op, Options(processors=NARROW))))
        found = step_errors(version, torch.device("cpu"), torch.float32, "cuda")
    assert_below(found, 1e-4)


# ---------------------------------------------------------------- does the harness see what it should


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Broken kernels are not kept."""
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_missing_barrier_changes_the_result(private_cache):
    """Without the barrier of its stage, a kernel must not pass for correct."""
    text = (gpu.SOURCES / "wkv7.cu").read_text()
    source = private_cache / "mutant.cu"
    source.write_text(text.replace("sync();  // the half", "(void)0;  // the half"))
    assert source.read_text() != text
    inputs, state = [x.detach() for x in make_inputs("wkv7", (1, 9, 1, 64))], make_state("wkv7", 1, 1, 64).detach()
    found = []
    for order in (0, 1):
        with as_backend("wkv7", harnessed("wkv7", Options(order=order), source)):
            found.append(RECURRENCES["wkv7"].function(*inputs, state=state, backend="cuda")[0])
    assert not torch.equal(found[0], found[1])


SMALL = """
#include "device.h"
namespace rwkv {
__global__ void kernel(int which, const float* x, bf16* y) {
    const int64_t i = thread_index(), at = block_index() * 64 + i;
    switch (which) {
        case 0: store(y + at, x[at]); break;
        case 1: if (i < 40) sync(); break;
        case 2: if (i != 5) shuffle_xor(x[0], 8); break;
        case 3: shuffle_xor(x[0], 32); break;
        case 4: y[64 + i] = bf16{0}; break;
        case 5: store(y + at, x[-1 - i]); break;
        case 6: const_cast<float*>(x)[i] = 1.f; break;
    }
}
RWKV_PUBLIC int64_t rwkv_interval() { return INTERVAL; }
RWKV_EXPORT rwkv_forward(void* const* x, const int64_t* n, int, int device, void* stream) {
    const OnDevice here(device);
    launch(kernel, (n[0] + 63) / 64, 64, Stream(stream), int(n[1]), tensor<const float>(x, 0), tensor<bf16>(x, 1));
    return here.error();
}
RWKV_EXPORT rwkv_backward(void* const*, const int64_t*, int, int, void*) { return nullptr; }
}
"""


@pytest.fixture(scope="module")
def small_kernel(tmp_path_factory):
    """small_kernel(which case of SMALL, x, y) -> None, or the error."""
    source = tmp_path_factory.mktemp("small") / "small.cu"
    source.write_text(SMALL)

    def call(which, x, y, **options):
        return Harness("wkv7", functions(source), Options(**options))._run("rwkv_forward", [x], [y], (len(x), which), 0)

    return call


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (1, "40 wait at a barrier, 0 at a shuffle, 24 have ended"),
        (2, "31 at a shuffle"),
        (3, "not one of its 32"),
        (4, "outside of the tensors .* near tensor 1, 0 bytes after its end"),
        (5, "outside of the tensors .* near tensor 0, 4 bytes before its begin"),
        (6, "wrote to tensor 0"),
    ],
)
def test_what_hangs_or_corrupts_memory_on_a_gpu_is_a_sentence_here(small_kernel, which, message):
    """Threads that wait for ever, accesses out of bounds, writing to an input; and the next call works again."""
    x = torch.ones(64) * 3
    failure = small_kernel(which, x, x.bfloat16(), at_end=which != 5)
    assert failure and re.search(message, failure), failure
    y = torch.zeros(64, dtype=torch.bfloat16)
    assert small_kernel(0, x, y) is None and torch.equal(y.float(), x)


def test_rounding_to_bfloat16_is_that_of_torch(small_kernel):
    """Ties go to even, overflow to infinity, NaN stays NaN."""
    upper = torch.arange(1 << 16, dtype=torch.int64).repeat_interleave(4)
    bits = (upper << 16) + torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat(1 << 16)
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    assert small_kernel(0, x, y) is None
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), x.bfloat16()[number].view(torch.int16))
    assert y[~number].isnan().all()


# ---------------------------------------------------------------- do the compilers take them


@pytest.mark.slow
@pytest.mark.parametrize(("op", "capability"), [("wkv7", "80"), *((op, "90") for op in OPS)])
def test_nvcc_compiles_without_spills_in_forward(op, capability, tmp_path):
    """Registers that do not suffice cost memory traffic at every token."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done = compiled(gpu.cuda_recipe(op, capability), tmp_path / "x.so", "-Xptxas", "-v")
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr, re.S
    )
    assert len(kernels) > 1
    for name, stores, loads in kernels:
        backward = "columns" in name or "backward" in name or "Lb1E" in name  # Lb1E: <true>, the sweep in reverse
        assert backward or (stores, loads) == ("0", "0"), name


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op in ("wkv4", "wkv7")])
def test_hipcc_compiles_without_scratch_memory(op, tmp_path):
    """The same source for AMD; benchmarks/static_gpu.py compiles everything for every architecture."""
    if shutil.which("hipcc") is None:
        pytest.skip("hipcc is not installed")
    done = compiled(gpu.hip_recipe(op, "gfx90a"), tmp_path / "x.so", "-Rpass-analysis=kernel-resource-usage")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"ScratchSize \[bytes/lane\]: (\d+)", done.stderr)) == {"0"}


def test_an_architecture_that_the_compiler_does_not_know_is_named(private_cache):
    """A GPU newer than the toolkit: the reason is one line, and the run goes on without the kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    with pytest.raises(build.BuildError, match=r"(?i)unsupported gpu architecture.*999"):
        build.binary(gpu.cuda_recipe("wkv7", "999"))


def test_without_a_compiler_or_gpu_the_reason_is_named(monkeypatch, caplog):
    """No nvcc: what to install. No GPU: said at once."""
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    with pytest.raises(build.BuildError, match=r"nvcc.*CUDA_HOME"):
        gpu.cuda_recipe("wkv7", "90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(build.BuildError, match="no GPU"):
        gpu.kernel("wkv7", torch.device("cuda"))
