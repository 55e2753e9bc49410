"""Compiled blocks (`--compile 1`): the values and gradients of the same steps without a compiler, and no graph breaks.

`fullgraph` makes a break inside a block an error. The backend "eager" of torch.compile runs the graph as it was taken,
"aot_eager" with its backward pass taken ahead; "inductor", which users have, makes code of it.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.runtime.cache_dir_utils import cache_dir

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.model.in_graph import compiled_blocks, what_to_do
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.settings.exit_status import Failure
from tests.support.models import build, random_tensors

PACKED = torch.tensor([0, 33, 33, 100])  # a segment without a token


def step(model, starts=PACKED, cuts=()):
    """Loss and gradients of one step over 100 tokens; with `cuts` over pieces that hand on their states."""
    tokens = torch.randint(300, (1, 100), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)  # dropouts
    state, loss = None, torch.zeros(())
    for first, last in zip((0, *cuts), (*cuts, 100), strict=True):
        hidden, state = model(tokens[:, first:last], state, None if cuts else starts, keep_state=bool(cuts))
        loss = loss + model.head(hidden).float().square().sum() / 1000
    loss.backward()
    grads = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def same(found, wanted):
    """Whether two steps agree to 1e-6 in every tensor."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name] - x).norm() <= 1e-6 * x.norm(), name


@pytest.mark.parametrize(("version", "layers"), [("x040", 1), ("x060", 1), ("x070", 2)])
def test_compiled_blocks_are_the_blocks(version, layers):
    """If this breaks, `--compile 1` trains another model of this version, or stops."""
    tensors = random_tensors(version, n_layer=layers)
    plain, compiled = build(tensors), build(tensors)
    compiled.compile_blocks("eager")
    same(step(compiled), step(plain))


@pytest.mark.parametrize(("backend", "grad_cp", "cuts"), [("aot_eager", True, ()), ("eager", False, (40, 41))])
def test_states_and_recomputed_blocks_of_a_compiled_model(backend, grad_cp, cuts):
    """Infinite context carries states through them, and past a single token; `--grad_cp 1` runs them twice."""
    tensors = random_tensors("x052", n_layer=1)
    plain, compiled = build(tensors), build(tensors, grad_cp=grad_cp)
    compiled.compile_blocks(backend)
    same(step(compiled, cuts=cuts), step(plain, cuts=cuts))


@pytest.mark.parametrize(("mode", "store"), [("lora", "int8"), ("dora", "fp8")])
def test_adapters_over_packed_matrices_are_compiled(mode, store):
    """If this breaks, `--compile 1` cannot fine-tune a packed model, or draws other dropouts."""
    tensors = random_tensors("x052", n_layer=1)
    plan = make_plan(mode, 1, rank=4, dropout=0.1, lr_init=1.0, lr_final=1.0)
    plain, compiled = (build_model(tensors, BuildOptions(torch.float32, plan=plan, quant=store))[0] for _ in range(2))
    for model in (plain, compiled):
        model.train()
    compiled.compile_blocks("eager")
    same(step(compiled), step(plain))


def gradients(model):
    """Last hidden states and the gradients of all parameters, in float64, for random numbers as the former's."""
    generator = torch.Generator().manual_seed(3)
    hidden, _ = model(torch.randint(300, (1, 100), generator=generator), starts=PACKED, keep_state=False)
    hidden.backward(torch.randn(hidden.shape, generator=generator).to(hidden))
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().double(), **grads}


def test_inductor_is_as_exact_as_the_blocks(monkeypatch, tmp_path):
    """If this breaks, `--compile 1` stops where it makes code, or computes less exactly than a plain step does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tensors = random_tensors(n_layer=1)
    plain, compiled = build(tensors), build(tensors)
    compiled.compile_blocks()
    exact = gradients(build(tensors, torch.float64))
    for (name, wanted), x, found in zip(
        exact.items(), *(gradients(m).values() for m in (plain, compiled)), strict=True
    ):
        off, allowed = (found - wanted).norm(), 2 * (x - wanted).norm() + 1e-7 * wanted.norm()
        assert off <= allowed, (name, float(off / wanted.norm()), float(allowed / wanted.norm()))


def test_half_a_file_of_a_killed_run_is_named():
    """If this breaks, who stopped a run while it compiled has no compiled one again and does not know why."""
    folder = cache_dir()
    said = what_to_do(f"InductorError: ImportError: {folder}/7p/c7.main.so: file too short")
    assert said.endswith(f"remove {folder}, where a run that was stopped may have left half a file, or leave it 0")


def test_a_look_is_not_compiled():
    """Sampling and scoring meet rows of every length: they must not compile for each of them."""
    model = build(random_tensors("x052", n_layer=1)).eval()
    model._compiled = None
    with torch.no_grad():
        wanted, _ = model(torch.ones(1, 5, dtype=torch.int64))
        model._compiled = lambda *_: pytest.fail("a block was compiled")
        found, _ = model(torch.ones(1, 5, dtype=torch.int64))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("only_backward", [False, True])
def test_a_compiler_that_fails_is_told_in_a_sentence(only_backward):
    """If this breaks, a user reads a hundred lines of PyTorch's instead of what to do."""

    def broken(graph, inputs):
        raise OSError("no space left\nfor files")

    call = compiled_blocks(
        aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken) if only_backward else broken
    )
    block = build(random_tensors("x052", n_layer=1)).blocks[0]
    with pytest.raises(Failure, match=r"--compile 1: .*no space left.*; leave it 0"):
        call(block, torch.zeros(1, 3, 64), None, None, None, "auto", False)
