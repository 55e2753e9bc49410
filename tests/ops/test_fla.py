"""The backend of flash-linear-attention: what it is given and what becomes of its answers, with a stand-in.

The library needs a GPU and is in no test environment. The stand-in has the published signatures (fla-org/
flash-linear-attention, fla/ops/rwkv6/chunk.py and fla/ops/rwkv7/chunk.py) and the mathematics of its naive recurrences
(fla/ops/rwkv6/recurrent_naive.py, fla/ops/generalized_delta_rule/dplr/naive.py), written anew with states (K, V).
"""

import itertools
import sys
from types import ModuleType

import pytest
import torch

from rwkv_rlhf.ops import fla, judge
from rwkv_rlhf.ops.backends import candidates, choose

GPU = torch.device("cuda", 0)
SHAPE = (1, 23, 2, 32)


def rows_of(tensors, cu_seqlens):
    """The sequences of (B, T, ...) tensors, each (T, ...)."""
    if cu_seqlens is None:
        return [tuple(x[b] for x in tensors) for b in range(len(tensors[0]))]
    assert all(len(x) == 1 for x in tensors), "packed sequences have batch size 1"
    edges = cu_seqlens.tolist()
    assert edges == sorted(set(edges)), "the library is not known to take empty sequences"
    return [tuple(x[0, a:b] for x in tensors) for a, b in itertools.pairwise(edges)]


def run(step, tensors, scale, initial_state, output_final_state, cu_seqlens):
    rows = rows_of(tensors, cu_seqlens)
    assert initial_state.dtype == torch.float32 and initial_state.is_contiguous() and len(initial_state) == len(rows)
    outputs, states = [], []
    for row, S in zip(rows, initial_state, strict=True):
        ys = []
        for token in zip(*(x.float() for x in row), strict=True):
            y, S = step(S, *token)
            ys.append(y * scale)
        outputs.append(torch.stack(ys))
        states.append(S)
    o = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    return o.to(tensors[0].dtype), torch.stack(states) if output_final_state else None


def chunk_rwkv6(
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None, **_
):
    def step(S, r, k, v, w):
        kv = k[..., None] * v[..., None, :]
        return ((S + u.float()[..., None] * kv) * r[..., None]).sum(-2), S * w.exp()[..., None] + kv

    scale = r.shape[-1] ** -0.5 if scale is None else scale
    return run(step, (r, k, v, w), scale, initial_state, output_final_state, cu_seqlens)


def chunk_rwkv7(
    r,
    w,
    k,
    v,
    a,
    b,
    scale=1.0,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    safe_gate=False,
    chunk_size=None,
    disable_recompute=False,
    cp_context=None,
    lower_bound=None,
    **_,
):
    def step(S, r, w, k, v, a, b):
        S = S * w.exp()[..., None] + (S * a[..., None]).sum(-2, keepdim=True) * b[..., None]
        return ((S + k[..., None] * v[..., None, :]) * r[..., None]).sum(-2), S + k[..., None] * v[..., None, :]

    return run(step, (r, w, k, v, a, b), scale, initial_state, output_final_state, cu_seqlens)


@pytest.fixture
def installed(monkeypatch):
    """The stand-in in place of the library, on a CPU."""
    for name, function in (("rwkv6", chunk_rwkv6), ("rwkv7", chunk_rwkv7)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    monkeypatch.setattr(fla.Backend, "refusal", lambda *_: None)


@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize("starts", [None, [0, 23], [0, 7, 23], [0, 0, 9, 9, 23, 23]], ids=str)
@pytest.mark.parametrize("op", fla.OPERATORS)
def test_values_and_gradients_are_those_of_the_recurrence(op, starts):
    """If this breaks, --wkv_backend fla trains with transposed states, another decay, a scale, or documents that run
    into each other. Values and gradients against the plain loop in float64, states included."""
    batch = 1 if starts else 2
    rows = len(starts) - 1 if starts else batch
    inputs = judge.make_inputs(op, (batch, *SHAPE[1:]), torch.float32, torch.device("cpu"))
    state = judge.make_state(op, rows, *SHAPE[2:])
    edges = torch.tensor(starts) if starts else None
    wide = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    want = judge.results(op, wide[:-1], wide[-1], edges, backend="naive")
    got = judge.results(op, inputs, state, edges, backend="fla")
    assert {name: error for name, error in judge.errors(got, want).items() if not error < 1e-5} == {}


@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize("op", fla.OPERATORS)
def test_sixteen_bits_keep_their_dtype(op):
    """If this breaks, a run in bf16 ends in a message about dtypes, or computes the decay in bf16."""
    inputs = judge.make_inputs(op, SHAPE, torch.bfloat16, torch.device("cpu"))
    got = judge.results(op, inputs, judge.make_state(op, 1, *SHAPE[2:]), backend="fla")
    names = judge.RECURRENCES[op].names
    assert got["y"].dtype == torch.bfloat16 and got["final state"].dtype == torch.float32
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in zip(names, inputs, strict=True))


def test_why_it_cannot_run_is_one_sentence(monkeypatch):
    """If this breaks, --wkv_backend fla ends in an import error, or a wish of the user is passed over in silence."""
    versions = {"found": None}

    def version(name):
        if versions["found"] is None:
            raise fla.importlib.metadata.PackageNotFoundError(name)
        return versions["found"]

    def said(device, dtype, shape=SHAPE):
        fla._missing.cache_clear()
        with pytest.raises(ValueError, match="the backend asked for cannot run wkv7: fla: ") as caught:
            choose("wkv7", device, dtype, shape, "fla")
        return str(caught.value)

    monkeypatch.setattr(fla.importlib.metadata, "version", version)
    try:
        assert "pip install flash-linear-attention" in said(GPU, torch.bfloat16)
        versions["found"] = "0.2.1"
        assert "0.2.1 is too old; 0.6 is the oldest" in said(GPU, torch.bfloat16)
        versions["found"] = "0.6.0"
        assert "runs on GPUs" in said(torch.device("cpu"), torch.bfloat16)
        assert "no operator for torch.float32" in said(GPU, torch.float32)
        assert "head size 96" in said(GPU, torch.bfloat16, (1, 4, 1, 96))
        assert choose("wkv7", GPU, torch.bfloat16, SHAPE, "fla") == ("fla", "")
    finally:
        fla._missing.cache_clear()
    with pytest.raises(ValueError, match="wkv4 has no backend 'fla'; choose one of auto"):
        choose("wkv4", GPU, torch.bfloat16, SHAPE[:3], "fla")


def test_auto_does_not_take_it():
    """If this breaks, a run changes its numbers because somebody installed a package."""
    assert "fla" not in candidates("wkv7", GPU, torch.bfloat16)
