"""Every kernel that a GPU is offered, and a training step of every version, on the GPU itself: `bash tests/gpu.sh`.

A backend that refuses to run there fails: on this machine each must. The judge is the plain loop in float64 on the CPU.
"""

import itertools

import pytest
import torch

from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.ops import judge
from rwkv_rlhf.ops.backends import backends_of
from rwkv_rlhf.ops.check import LIMITS, TRITON_LIMIT, cases, examine
from rwkv_rlhf.ops.judge import RECURRENCES, make_inputs, make_state
from rwkv_rlhf.ops.starts import Starts
from tests.support.lasting import lasting
from tests.support.version_step import step_errors

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # the first test of an op compiles it

GPU = torch.device("cuda")
CASES = [
    pytest.param(case, backend, dtype, id=f"{case.name} {backend} {str(dtype)[6:]}")
    for case in cases()
    for backend in backends_of(case.op)
    if backend not in ("cpu", "naive")
    for dtype in LIMITS
]


@pytest.mark.parametrize(("case", "backend", "dtype"), CASES)
def test_values_and_gradients_are_the_plain_loop_s(case, backend, dtype, record_property):
    """If this breaks, runs on a GPU learn from wrong outputs, final states, or gradients of inputs or states."""
    found = examine(case, backend, GPU, dtype)
    record_property("worst", f"{found.worst} {found.error:.1e}")
    record_property("milliseconds", found.milliseconds)
    assert not found.refusal and not found.failure
    assert found.agrees, f"{found.worst}: {found.error:.1e}, at most {found.limit}"


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in RECURRENCES for b in ("cuda", "triton")])
def test_packed_rows_are_the_plain_loop_s(op, backend, dtype, record_property):
    """If this breaks, documents that share a row leak into each other on a GPU, or empty ones lose their state."""
    lengths = [0, 70, 1, 0, 64, 0]
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    shape = (1, sum(lengths), 2, 64)
    inputs, state = make_inputs(op, shape, dtype, GPU), make_state(op, len(lengths), *shape[2:], device=GPU)
    values = judge.results(op, inputs, state, starts.to(GPU), backend)
    wide = [x.detach().cpu().double().requires_grad_() for x in (*inputs, state)]
    exact = judge.results(op, wide[:-1], wide[-1], starts, "naive")
    found = {name: judge.error(values[name], exact[name]) for name in exact}
    record_property("worst", f"{max(found, key=found.get)} {max(found.values()):.1e}")
    limit = max(LIMITS[dtype], TRITON_LIMIT if backend == "triton" else 0)
    assert not {name: error for name, error in found.items() if not error <= limit}


def cut_into(op, lengths, heads):
    """Pieces in which Triton's kernels run rows of these lengths on this GPU."""
    from rwkv_rlhf.ops.triton.recurrences import MatrixKernel

    return len(MatrixKernel(op)._pieces(Starts([0, *itertools.accumulate(lengths)]), heads, GPU)) - 1


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
def test_a_long_row_in_pieces_is_the_plain_loop_s(op, dtype, record_property):
    """If this breaks, one long document, beside shorter ones, is another document in the pieces that fill a GPU."""
    lengths = [30, 0, 1070, 17]
    assert cut_into(op, lengths, 2) > len(lengths)
    starts, shape = torch.tensor([0, *itertools.accumulate(lengths)]), (1, sum(lengths), 2, 64)
    inputs = lasting(op, make_inputs(op, shape, dtype, GPU))
    state = make_state(op, len(lengths), *shape[2:], device=GPU)
    values = judge.results(op, inputs, state, starts, "triton")
    wide = [x.detach().cpu().double().requires_grad_() for x in (*inputs, state)]
    exact = judge.results(op, wide[:-1], wide[-1], starts, "naive")
    found = {name: judge.error(values[name], exact[name]) for name in exact}
    record_property("worst", f"{max(found, key=found.get)} {max(found.values()):.1e}")
    assert not {name: error for name, error in found.items() if not error <= max(LIMITS[dtype], TRITON_LIMIT)}


@pytest.mark.parametrize("op", ["wkv5", "wkv6", "wkv7"])
def test_the_pieces_of_4096_tokens_are_the_whole_row(op, monkeypatch, record_property):
    """If this breaks, a long row of a usual model (B1 T4096 C2048) learns from other gradients than in a batch."""
    from rwkv_rlhf.ops import recurrence
    from rwkv_rlhf.ops.triton.recurrences import MatrixKernel

    shape = (1, 4096, 32, 64)
    inputs = lasting(op, make_inputs(op, shape, torch.float32, GPU))
    state = make_state(op, 1, *shape[2:], device=GPU)
    values = judge.results(op, inputs, state, backend="triton")
    monkeypatch.setattr(recurrence, "kernel", lambda op, *_: MatrixKernel(op, length=0))
    found = judge.errors(values, judge.results(op, inputs, state, backend="triton"))
    record_property("pieces", cut_into(op, shape[1:2], shape[2]))
    record_property("worst", f"{max(found, key=found.get)} {max(found.values()):.1e}")
    assert not {name: error for name, error in found.items() if not error <= 2 * LIMITS[torch.float32]}


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_is_that_of_the_cpu(version, backend, dtype, record_property):
    """If this breaks, training on a GPU is another training: the loss, or a parameter's gradient, is not the CPU's."""
    found = step_errors(version, GPU, dtype, backend)
    record_property("worst", f"{max(found, key=found.get)} {max(found.values()):.1e}")
    limit = 1e-1 if dtype == torch.bfloat16 else 1e-3 if backend == "triton" else 1e-4
    assert found["loss"] <= (1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not {name: error for name, error in found.items() if not error <= limit}
