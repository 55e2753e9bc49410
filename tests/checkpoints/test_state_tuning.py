"""State tuning: the learnt initial state is the state that every sequence begins from, in training and afterwards."""

import dataclasses

import pytest
import torch

from rwkv_rlhf.checkpoints.adapter_files import open_adapter
from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model, trainable
from rwkv_rlhf.checkpoints.merging import Merged, check_merged, load_combined
from rwkv_rlhf.checkpoints.run_folder import trained_tensors
from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.sizes import STATES
from rwkv_rlhf.model.state import LayerState, State
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.scoring.infinite_context import ChunkedRows, run_in_chunks
from tests.support.merging import base_tensors
from tests.support.models import random_tensors
from tests.support.processes import rwkv_package

TOKENS = torch.tensor([[5, 0, 17, 299, 3, 3, 42]])
PLAN = make_plan("state", 2, lr_init=1.0, lr_final=0.01)


def tuned(tmp_path, version, states=STATES, **options):
    base = tmp_path / "base.pth"
    if not base.exists():
        write_tensors(random_tensors(version, n_layer=2), base)
    plan = dataclasses.replace(PLAN, states=states)
    return load_model(base, BuildOptions(torch.float64, plan=plan, **options))


def learn(model):
    """Numbers in the learnt states, as training would leave them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.3 + 0.1)


@pytest.mark.parametrize("version", VERSIONS)
def test_only_the_states_learn_and_zeros_are_no_state(tmp_path, version):
    """If this breaks, state tuning starts from another model than the one that was loaded."""
    model, _ = tuned(tmp_path, version)
    assert {name.split(".", 2)[2] for name in trainable(model)} == set(STATES)
    plain, _ = load_model(tmp_path / "base.pth", BuildOptions(torch.float64))
    hidden, _ = model(TOKENS)
    assert torch.allclose(hidden, plain(TOKENS)[0], atol=1e-12)
    hidden.square().sum().backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("version", VERSIONS)
def test_a_learnt_state_is_the_state_given_by_hand(tmp_path, version):
    """Every row of a batch and every packed document begins from it, whole or in chunks."""
    model, _ = tuned(tmp_path, version)
    learn(model)
    plain, _ = load_model(tmp_path / "base.pth", BuildOptions(torch.float64))
    layers = []
    for block in model.blocks:
        wkv = block.att.time_state.detach()
        if version == "x040":
            wkv = torch.cat([wkv, torch.zeros(len(wkv), 1, dtype=wkv.dtype)], 1)  # p and q with the scale e^0
        layers.append(LayerState(block.att.shift_state.detach()[None], wkv[None], block.ffn.shift_state.detach()[None]))
    given = State(tuple(layers))
    whole, _ = model(TOKENS)
    assert torch.allclose(whole, plain(TOKENS, given)[0], atol=1e-12)
    starts = torch.tensor([0, 3, 3, 7])
    packed, _ = model(TOKENS, None, starts)
    assert torch.allclose(packed, plain(TOKENS, given.select(torch.zeros(3, dtype=torch.long)), starts)[0], atol=1e-12)
    packed.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    rows = ChunkedRows(2)
    rows.add(TOKENS[0], starts)
    run_in_chunks(model, rows, lambda hidden, span: {"hidden": hidden})["hidden"].square().sum().backward()
    for name, parameter in trainable(model).items():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-10), name


@pytest.mark.parametrize("version", VERSIONS)
def test_a_learnt_state_is_merged_into_the_model(tmp_path, version):
    """The merged file carries the states, and answers as base and checkpoint do together."""
    model, report = tuned(tmp_path, version, ("att.time_state",))
    learn(model)
    checkpoint = tmp_path / "rwkv-0.pth"
    write_tensors(trained_tensors(model, report.dtypes, "base"), checkpoint)
    write_sidecar(sidecar_of(version, report.layout, PLAN, tmp_path / "base.pth"), checkpoint)
    together, _ = load_combined(tmp_path / "base.pth", checkpoint, BuildOptions(torch.float64))
    assert torch.allclose(together(TOKENS)[0], model(TOKENS)[0], atol=1e-6)
    base, file = read_tensors(tmp_path / "base.pth"), open_adapter(checkpoint)
    merged = dict(Merged(base, file))
    assert merged.keys() - base.keys() == {f"blocks.{i}.att.time_state" for i in range(2)}
    difference, allowed = check_merged(base, file, merged)
    assert difference <= allowed
    write_tensors(merged, tmp_path / "merged.pth")
    again, _ = load_model(tmp_path / "merged.pth", BuildOptions(torch.float64))
    assert torch.allclose(again(TOKENS)[0], model(TOKENS)[0], atol=1e-6) and not trainable(again)


@pytest.mark.slow
def test_a_merged_state_is_that_of_the_rwkv_package(tmp_path):
    """The package begins from the states of RWKV-5.2 and 6 files: key and value interchanged would be another state."""
    ours, paths = [], []
    for version in ("x052", "x060"):
        folder = tmp_path / version
        folder.mkdir()
        base, checkpoint = folder / "base.pth", folder / "rwkv-0.pth"
        write_tensors(base_tensors(torch.float32, version), base)
        model, report = tuned(folder, version, ("att.time_state",))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
            ours.append(model.head(model(TOKENS[:, :4])[0][0, -1]).float())
        write_tensors(trained_tensors(model, report.dtypes, "base"), checkpoint)
        write_sidecar(sidecar_of(version, report.layout, PLAN, base), checkpoint)
        write_tensors(dict(Merged(read_tensors(base), open_adapter(checkpoint))), folder / "merged.pth")
        paths += [str(folder / "merged"), str(folder / "base")]
    theirs = torch.tensor(rwkv_package("last", TOKENS[0, :4].tolist(), paths, v7=False))
    scale = theirs.abs().max()
    for mine, merged, base in zip(ours, theirs[0::2], theirs[1::2]):
        assert (mine - merged).abs().max() < 1e-4 * scale
        assert (base - merged).abs().max() > 1e-2 * scale
