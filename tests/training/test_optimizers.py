"""What --optim names does what its paper says, takes the memory that a dry run prints, and goes on from a stop."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.checkpoints.tensor_tree import read_tree, write_tree
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.training.optimizers import check_optimizer, make_optimizer, parameter_groups, state_of, takes
from rwkv_rlhf.training.strategies import load_rank_state, rank_state
from tests.support.models import random_tensors

RATE, DECAY, BETAS, EPS = 0.01, 0.1, (0.8, 0.9), 1e-6
STEPS = 4
# cpu_adam is compiled at its first use, which takes a minute, and many on a busy machine; a compiler that is killed
# leaves a lock behind that the next one waits for
COMPILED = (pytest.mark.slow, pytest.mark.timeout(1800))
OPTIMS = [pytest.param(name, marks=COMPILED) if facts.host else name for name, facts in OPTIMIZERS.items()]


def optimizer_of(optim, named, **more):
    """The optimizer over parameters by name, in one group."""
    if package := OPTIMIZERS[optim].needs:
        pytest.importorskip(package)
    group = {"params": list(named.values()), "names": list(named), "lr": RATE, "weight_decay": DECAY}
    return make_optimizer(Config(optim=optim, beta1=BETAS[0], beta2=BETAS[1], adam_eps=EPS, **more), [group])


def adamw_step(p, g, memory, t):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    m = memory["m"] = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * g
    v = memory["v"] = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * g * g
    divided = (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
    return p - RATE * DECAY * p - RATE * divided


def lion_step(p, g, memory, t):
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    m = memory.get("m", 0)
    memory["m"] = BETAS[1] * m + (1 - BETAS[1]) * g
    return p - RATE * (np.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + DECAY * p)


def adopt_step(p, g, memory, t):
    """Taniguchi et al., arXiv 2411.02853, algorithm 2, with decoupled decay; its first step counts as t = 0."""
    if t == 1:
        memory.update(v=g * g, m=0)
        return p
    clip = (t - 1) ** 0.25
    memory["m"] = BETAS[0] * memory["m"] + (1 - BETAS[0]) * np.clip(
        g / np.maximum(np.sqrt(memory["v"]), EPS), -clip, clip
    )
    memory["v"] = BETAS[1] * memory["v"] + (1 - BETAS[1]) * g * g
    return p - RATE * DECAY * p - RATE * memory["m"]


FORMULAS = {"lion": lion_step, "adopt": adopt_step}


@pytest.mark.parametrize("optim", OPTIMS)
def test_steps_are_those_of_the_paper(optim):
    """If this breaks, a published recipe trains something else. Small vectors, which no optimizer treats otherwise."""
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.randn(7, generator=generator))
    named = {"blocks.0.ln1.weight": p}
    if OPTIMIZERS[optim].matrices:
        named["blocks.0.att.key.weight"] = nn.Parameter(torch.randn(4, 4, generator=generator))
    optimizer = optimizer_of(optim, named)
    want, memory = p.detach().double().numpy(), {}
    for t in range(1, STEPS + 1):
        p.grad = torch.randn(7, generator=generator) * t
        want = FORMULAS.get(optim, adamw_step)(want, p.grad.double().numpy(), memory, t)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_muon_makes_the_update_orthogonal_and_as_large_as_adamws(shape):
    """If this breaks, learning rates of AdamW are wrong by a factor for Muon: its update has a root mean square of 0.2,
    and singular values that are nearly equal (Liu et al., arXiv 2502.16982, section 2.2)."""
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = optimizer_of("muon", {"blocks.0.att.key.weight": p})
    p.grad = torch.randn(shape, generator=generator)
    optimizer.step()
    update = -p.detach() / RATE
    values = torch.linalg.svdvals(update) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert 0.13 < float(update.square().mean().sqrt()) < 0.25
    assert float((update * p.grad).sum()) > 0  # downhill


@pytest.mark.parametrize("optim", ["adam8bit", "adamw8bit"])
def test_moments_of_eight_bits_stay_near_those_of_32(optim):
    """If this breaks, saving memory costs the training: within 2% of AdamW's way after ten steps."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(64, 128, generator=generator)
    ways = {}
    grads = [torch.randn(64, 128, generator=generator) for _ in range(10)]
    for name in (optim, "adamw"):
        p = nn.Parameter(start.clone())
        optimizer = optimizer_of(name, {"blocks.0.att.key.weight": p})
        for grad in grads:
            p.grad = grad
            optimizer.step()
        ways[name] = p.detach() - start
    assert (ways[optim] - ways["adamw"]).norm() < 0.02 * ways["adamw"].norm()


@pytest.fixture(scope="module")
def trained():
    """trained(mode, precision): a two-layer RWKV-7 and the groups of its trained parameters, with gradients."""

    def make(mode="full", dtype=torch.float32):
        plan = make_plan(mode, 2, rank=32, dropout=0.0, lr_init=RATE, lr_final=RATE, weight_decay=DECAY)
        tensors = random_tensors("x070", n_layer=2)
        model, _ = build_model(tensors, BuildOptions(dtype, plan=plan))
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        return model, parameter_groups(model, plan, "x070", layerwise=True)

    return make


@pytest.mark.parametrize("mode", ["full", "lora", "bone"])
@pytest.mark.parametrize("optim", OPTIMS)
def test_the_state_is_as_large_as_the_plan_says(optim, mode, trained):
    """If this breaks, a run that the dry run promised to fit dies at its first step. To the byte, but for a few numbers
    that a tensor has in common with all others."""
    if package := OPTIMIZERS[optim].needs:
        pytest.importorskip(package)
    model, groups = trained(mode)
    if optim == "muon" and mode == "bone":
        with pytest.raises(ValueError, match="nothing that trains is a matrix of a block"):
            make_optimizer(Config(optim=optim), groups)
        return
    optimizer = make_optimizer(Config(optim=optim), groups)
    for _ in range(2):
        optimizer.step()
    numbers = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in numbers if x.dim()}
    size = state_of(optim, model)
    assert size.own + size.rest == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = 2 * 4 * 256  # the levels of eight bits
    assert size.bytes <= sum(held.values()) <= size.bytes + shared
    assert f"optimizer: {optim} for {size.own:,} numbers" in size.line()


def test_muon_takes_the_matrices_of_the_blocks(trained):
    """If this breaks, an embedding, the head, a norm or a small factor gets an orthogonal update, or no matrix does."""
    model, groups = trained()
    own = {name for name, p in model.named_parameters() if takes("muon", name, p)}
    halves = {"att": ("receptance", "key", "value", "output"), "ffn": ("key", "value")}
    assert own == {f"blocks.{i}.{half}.{m}.weight" for i in range(2) for half, ms in halves.items() for m in ms}
    optimizer = make_optimizer(Config(optim="muon"), groups)
    optimizer.step()
    with_momentum = {id(p) for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert with_momentum == {id(p) for name, p in model.named_parameters() if name in own}
    assert all(len(group["names"]) == len(group["params"]) for group in optimizer.param_groups)
    lora, _ = trained("lora")
    factors = {name.split(".")[-1] for name, p in lora.named_parameters() if p.requires_grad and takes("muon", name, p)}
    assert factors == {"lora_A", "lora_B"}


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_stopped_optimizer_goes_on_with_the_same_bits(optim, trained, tmp_path):
    """If this breaks, a resumed run ends elsewhere than one that was not stopped."""
    if package := OPTIMIZERS[optim].needs:
        pytest.importorskip(package)
    model, groups = trained()
    generator = torch.Generator().manual_seed(3)

    def run(optimizer, grads):
        for step in grads:
            for p, grad in zip((p for group in optimizer.param_groups for p in group["params"]), step, strict=True):
                p.grad = grad
            optimizer.step()

    optimizer = make_optimizer(Config(optim=optim), groups)
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(6)]
    run(optimizer, grads[:3])
    write_tree(rank_state(trainer_with(optimizer)), tmp_path / "state")
    stopped = copy.deepcopy([group["params"] for group in optimizer.param_groups])
    run(optimizer, grads[3:])

    again, groups = trained()
    resumed = make_optimizer(Config(optim=optim), groups)
    with torch.no_grad():
        for group, values in zip(resumed.param_groups, stopped, strict=True):
            for p, value in zip(group["params"], values, strict=True):
                p.copy_(value)
    load_rank_state(trainer_with(resumed), read_tree(tmp_path / "state"))
    run(resumed, grads[3:])
    for (name, want), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(want, found), name


def trainer_with(optimizer):
    """As much of Lightning's trainer as resume points ask for."""
    return SimpleNamespace(optimizers=[optimizer], strategy=None)


def test_a_state_of_another_run_is_refused(trained):
    """If this breaks, moments of other tensors are taken up in silence."""
    _, groups = trained()
    optimizer = make_optimizer(Config(), groups)
    optimizer.step()
    state = rank_state(trainer_with(optimizer))
    state["0"] = {name: value[:1] if value.dim() else value for name, value in state["0"].items()}
    with pytest.raises(ValueError, match=r"tensor 0 is .* another run, or of another number of ranks"):
        load_rank_state(trainer_with(optimizer), state)


def test_what_cannot_run_here_is_said_before_anything_is_loaded(monkeypatch):
    """If this breaks, a user learns after an hour of loading that a package is missing, or that a GPU's tensors cannot
    be stepped on the host."""
    monkeypatch.setattr("rwkv_rlhf.training.optimizers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"{optim} lion needs the package bitsandbytes: pip install bitsandbytes"):
        check_optimizer(Config(optim="lion"))
    monkeypatch.undo()
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("rwkv_rlhf.training.optimizers.device_for", lambda accelerator: "cuda")
    check_optimizer(Config(optim="cpu_adam", strategy="deepspeed_stage_2_offload"))
    with pytest.raises(ValueError, match="runs on the host, and what trains lies on the GPU"):
        check_optimizer(Config(optim="cpu_adam"))
