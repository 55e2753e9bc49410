"""Whole runs with every adapter, version and storage: trained, stopped, gone on with, merged, all the same model."""

import dataclasses
import json
import os
import re

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.run_folder import NUMBERED
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import merge, train
from rwkv_rlhf.plan import COLUMNS, plan_for
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.optimizers import parameter_groups
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[5, 0, 17, 256, 3, 3, 42, 7, 0, 101]])
# without a memory in the optimizer and with one rate, a run that was stopped and gone on with is the same run
MEMORYLESS = ("--beta1", 0, "--beta2", 0, "--lr_schedule", "constant", "--lr_init", "2e-3", "--lr_final", "2e-3")
RUNS = [
    ("lora", "x040", "none"),
    ("lora", "x060", "fp4"),
    ("pissa", "x070", "nf4"),
    ("pissa", "x052", "none"),
    ("bone", "x060", "fp8"),
    ("bone", "x040", "none"),
    ("dora", "x070", "int8"),
    ("miss", "x052", "int8"),
    ("state", "x070", "nf4"),
    ("state", "x040", "none"),
]


@pytest.fixture
def go(script, vocab_file, text_jsonl, base_of, tmp_path):
    """go(name, version, *words) runs train.py, which must succeed, and gives its folder."""

    def call(name, version, *words):
        shared = ["--load_model", base_of(version), "--vocab_file", vocab_file, "--proj_dir", tmp_path / name]
        shared += ["--sft", 1, "--data_file", text_jsonl, "--precision", "fp32", "--micro_bsz", 2, "--epoch_steps", 2]
        shared += ["--epoch_count", 1, "--epoch_save", 1]
        status, _, err = script(train.main, *shared, *words)
        assert status == 0, err
        return tmp_path / name

    return call


def planned(mode, quant):
    words = ["--peft", mode, "--quant", int(quant != "none"), *MEMORYLESS]
    words += ["--quant_mode", quant] if quant != "none" else []
    return words + (["--lora_r", 4, "--lora_dropout", 0] if mode != "state" else ["--state_shift", 1])


def logits(model):
    with torch.no_grad():
        return model.head(model(TOKENS)[0])[0].float()


def spread(one, two):
    return float((one - two).abs().max() / (one.max() - one.min()))


@pytest.mark.parametrize(("mode", "version", "quant"), RUNS)
def test_a_stopped_run_goes_on_and_merges_as_if_it_never_stopped(go, script, base_of, tmp_path, mode, version, quant):
    """If this breaks, a resumed adapter is another one (PiSSA's factors made anew), or the merged model is."""
    if quant in ("nf4", "fp4", "int8"):
        pytest.importorskip("bitsandbytes")
    words = planned(mode, quant)
    whole = read_tensors(go("whole", version, *words, "--epoch_count", 2) / "rwkv-1.pth")
    first = go("first", version, *words)
    second = go("second", version, *words, "--epoch_begin", 1, "--load_adapter", first / "rwkv-0.pth")
    again = read_tensors(second / "rwkv-1.pth")
    begun = read_tensors(first / "rwkv-0.pth")
    assert again.keys() == whole.keys() == begun.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not all(torch.equal(begun[name], whole[name]) for name in whole)
    base, output = base_of(version), tmp_path / "merged.pth"
    status, out, err = script(
        merge.main, "--base_model", base, "--lora_checkpoint", second / "rwkv-1.pth", "--output", output
    )
    assert status == 0 and "differ by at most" in out, err
    together = logits(load_combined(base, second / "rwkv-1.pth", BuildOptions(torch.float32))[0])
    merged = read_tensors(output)
    assert spread(together, logits(build_model(merged, BuildOptions(torch.float32))[0])) <= 1e-5
    assert spread(together, logits(build_model(read_tensors(base), BuildOptions(torch.float32))[0])) > 1e-3
    for name, tensor in read_tensors(base).items():
        assert merged[name].shape == tensor.shape and merged[name].dtype == tensor.dtype, name


def test_the_initial_factors_of_pissa_are_stored_once(go, script, base_of, tmp_path):
    """If this breaks, each checkpoint repeats them, or one that was moved without them is merged to nonsense."""
    folder = go("run", "x070", *planned("pissa", "none"), "--epoch_count", 2)
    (factors,) = folder.glob("pissa-init-*")
    for checkpoint in (path for path in folder.iterdir() if NUMBERED.match(path.name)):
        assert not [name for name in read_tensors(checkpoint) if "init" in name]
        sidecar = json.loads(checkpoint.with_suffix(".json").read_text())
        assert sidecar["initial_file"] == factors.name and len(sidecar["initial_sha256"]) == 64
    before = factors.stat().st_mtime_ns
    go("run", "x070", *planned("pissa", "none"))
    assert [path.stat().st_mtime_ns for path in folder.glob("pissa-init-*")] == [before]
    elsewhere = tmp_path / "elsewhere.pth"
    factors.rename(elsewhere)
    merging = ["--base_model", base_of("x070"), "--lora_checkpoint", folder / "rwkv-0.pth"]
    merging += ["--output", tmp_path / "m.pth"]
    status, _, err = script(merge.main, *merging)
    assert status == 2 and f"initial factors are not there: {factors}: give the right ones with --lora_init" in err
    assert script(merge.main, *merging, "--lora_init", elsewhere)[0] == 0
    elsewhere.rename(factors)  # a command of older programs names a file that this one calls otherwise
    status, _, err = script(merge.main, *merging, "--lora_init", folder / "init_pissa.pth")
    assert status == 2 and f"init_pissa.pth is not there, and {folder / 'rwkv-0.pth'} began from {factors}" in err
    assert "leave it out" in err
    factors.rename(elsewhere)
    resumed = (*planned("pissa", "none"), "--load_adapter", folder / "rwkv-0.pth")
    with pytest.raises(AssertionError, match=r"factors are not there.*give them with --load_adapter_pissa_init"):
        go("again", "x070", *resumed)
    go("again", "x070", *resumed, "--load_adapter_pissa_init", elsewhere)
    others = {name: tensor.clone() for name, tensor in read_tensors(elsewhere).items()}
    others["blocks.1.att.key.lora_A_init"] = others["blocks.1.att.key.lora_A_init"] + 1
    torch.save(others, elsewhere)
    status, _, err = script(merge.main, *merging, "--lora_init", elsewhere)
    assert status == 2 and "holds other initial factors" in err
    others["blocks.1.att.key.lora_A_init"] -= 1
    old = {re.sub(r"lora_([AB])_init", r"init_lora_\1", name): tensor for name, tensor in others.items()}
    torch.save(old, folder / "init_pissa.pth")  # as older programs write it, beside a checkpoint without a sidecar
    wanted = read_tensors(tmp_path / "m.pth")
    (folder / "rwkv-0.json").unlink()
    old_words = (*merging[:-1], tmp_path / "o.pth", "--type", "pissa", "--lora_init", folder / "init_pissa.pth")
    assert script(merge.main, *old_words)[0] == 0
    assert all(torch.allclose(t, wanted[name], atol=1e-5) for name, t in read_tensors(tmp_path / "o.pth").items())


def test_pissa_learns_where_a_matrix_is_zero(go, script, base_of, tmp_path):
    """If this breaks, the output matrices of a new RWKV-7, all zeros, never learn under PiSSA."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(base_of("x070")).items()}
    tensors["blocks.1.att.output.weight"].zero_()
    torch.save(tensors, tmp_path / "base.pth")
    folder = go("run", "x070", *planned("pissa", "none"), "--load_model", tmp_path / "base.pth", "--epoch_count", 2)
    merging = ["--base_model", tmp_path / "base.pth", "--lora_checkpoint", folder / "rwkv-1.pth"]
    status, _, err = script(merge.main, *merging, "--output", tmp_path / "m.pth")
    assert status == 0, err
    assert read_tensors(tmp_path / "m.pth")["blocks.1.att.output.weight"].abs().max() > 1e-6


def test_a_cold_adapter_is_merged_first_and_once(go, script, base_of, text_jsonl, vocab_file, tmp_path):
    """If this breaks, it is applied twice, or merge.py and --eval_only forget that it lies below."""
    pytest.importorskip("bitsandbytes")
    below = go("below", "x070", *planned("lora", "none"), "--lora_r", 8) / "rwkv-0.pth"
    status, _, err = script(
        *(merge.main, "--base_model", base_of("x070"), "--lora_checkpoint", below, "--output", tmp_path / "cold.pth")
    )
    assert status == 0, err
    words = planned("bone", "nf4")
    apart = go("apart", "x070", *words, "--load_model", tmp_path / "cold.pth") / "rwkv-0.pth"
    # a path from where the run was started: found again from elsewhere
    over = go("over", "x070", *words, "--load_cold_adapter", os.path.relpath(below)) / "rwkv-0.pth"
    assert json.loads(over.with_suffix(".json").read_text())["cold_file"] == str(below)
    one, two = read_tensors(apart), read_tensors(over)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    outputs = []
    for base, checkpoint in ((tmp_path / "cold.pth", apart), (base_of("x070"), over)):
        outputs.append(tmp_path / f"{checkpoint.parent.name}.pth")
        status, _, err = script(
            *(merge.main, "--base_model", base, "--lora_checkpoint", checkpoint, "--output", outputs[-1])
        )
        assert status == 0, err
    first, second = map(read_tensors, outputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = []
    for base, checkpoint in ((tmp_path / "cold.pth", apart), (base_of("x070"), over)):
        words = [
            "--load_model",
            base,
            "--load_adapter",
            checkpoint,
            "--val_file",
            text_jsonl,
            "--eval_only",
            1,
            "--json",
            1,
        ]
        words += ["--vocab_file", vocab_file, "--proj_dir", tmp_path / "eval", "--precision", "fp32"]
        status, out, err = script(train.main, *words)
        assert status == 0, err
        losses.append(json.loads(out)["loss"])
    assert losses[0] == losses[1]
    below.rename(tmp_path / "moved.pth")
    merging = ["--base_model", base_of("x070"), "--lora_checkpoint", over, "--output", tmp_path / "again.pth"]
    status, _, err = script(merge.main, *merging)
    assert status == 2 and f"over the cold adapter {below}, which is not there: --load_cold_adapter must" in err
    below.with_suffix(".json").rename(tmp_path / "moved.json")
    assert script(merge.main, *merging, "--load_cold_adapter", tmp_path / "moved.pth")[0] == 0
    status, _, err = script(merge.main, *merging, "--load_cold_adapter", apart)
    assert status == 2 and "is another file" in err


PROFILE = f"""{",".join(COLUMNS)}
emb,pissa,4,0,0,0.001,0.001,0,0,0,
0,{{0}},4,8,0,0.002,0.002,0,0.1,0.1,"att.receptance, ffn.value"
1,{{1}},8,8,0,0.002,0.002,0,0.3,0.3,{{2}}
head,{{3}},4,8,0,0.002,0.002,0,0,0,
"""


@pytest.mark.parametrize(
    ("version", "modes"),
    [
        ("x040", ("dora", "bone", "ln", "lora")),
        ("x052", ("bone", "miss", "gate", "pissa")),
        ("x060", ("pissa", "dora", "time_maa", "miss")),
        ("x070", ("lora", "full", "att.key", "dora")),
    ],
)
def test_rows_of_different_modes_train_and_merge_together(go, script, base_of, tmp_path, version, modes):
    """If this breaks, one row's mode decides for all, what RejectParts names learns, or a merge leaves a part out."""
    (tmp_path / "profile.csv").write_text(PROFILE.format(*modes))
    folder = go("run", version, "--layer_profile", tmp_path / "profile.csv", "--quant", 0, "--state", 1)
    own, base = read_tensors(folder / "rwkv-0.pth"), base_of(version)
    tails = {"lora": "lora_B", "pissa": "lora_B", "bone": "bone", "dora": "lora_M", "miss": "miss", "full": "weight"}
    assert {"emb.lora_A", f"head.{tails[modes[3]]}", f"blocks.0.ffn.key.{tails[modes[0]]}"} <= set(own)
    assert f"blocks.1.att.value.{tails[modes[1]]}" in own
    assert not [name for name in own if name.startswith(("blocks.0.att.receptance.", "blocks.0.ffn.value."))]
    assert not [name for name in own if name.startswith("blocks.1.") and modes[2] in name]
    states = read_tensors(folder / "rwkv-0-state.pth")
    assert set(states) == {f"blocks.{i}.att.time_state" for i in range(2)}
    assert all(torch.equal(states[name], own[name]) and own[name].any() for name in states)
    output = tmp_path / "merged.safetensors"
    status, _, err = script(
        *(merge.main, "--base_model", base, "--lora_checkpoint", folder / "rwkv-0.pth", "--output", output)
    )
    assert status == 0, err
    together = logits(load_combined(base, folder / "rwkv-0.pth", BuildOptions(torch.float32))[0])
    assert spread(together, logits(build_model(read_tensors(output), BuildOptions(torch.float32))[0])) <= 1e-5


def test_states_and_fast_factors_have_rates_of_their_own(base_of):
    """If this breaks, --lora_plus is a no-op, or a learnt state moves with the rate of the matrices."""
    config = Config(peft="lora", lora_plus=16.0, state=True, lr_init=1e-3, lr_final=1e-4)
    plan = plan_for(config, 2)
    row = dataclasses.replace(plan.rows["1"], mode="freeze", state_lr_init=0.5, state_lr_final=0.05)
    plan.rows["1"] = row
    tensors = read_tensors(base_of("x070"))
    model, _ = build_model(tensors, BuildOptions(torch.float32, plan=plan))
    rates = {name: g["lr_init"] for g in parameter_groups(model, plan, "x070", True) for name in g["names"]}
    assert rates["blocks.0.att.key.lora_A"] == 1e-3 and rates["blocks.0.att.key.lora_B"] == pytest.approx(16e-3)
    assert rates["blocks.0.ln1.weight"] == 1e-3 and rates["blocks.0.att.w0"] == 2e-3
    assert rates["blocks.1.att.time_state"] == 0.5 and rates["blocks.0.att.time_state"] == 1e-3
    assert not [name for name in rates if name.startswith("blocks.1.") and "state" not in name]


def test_the_recipe_of_state_tuning_runs_as_it_is_written(script, base_model, vocab_file, pairs_csv, tmp_path):
    """`--state 1 --orpo 1` with the shipped profile: only states learn, at their own rate."""
    tensors = torch.load(base_model, weights_only=True)
    profile = (ROOT / "layerprofile/32_TEST_State.csv").read_text().splitlines()
    two = [profile[0], *(line for line in profile if line.split(",")[0] in ("emb", "0", "1", "head"))]
    (tmp_path / "state.csv").write_text("\n".join(two) + "\n")
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / "out", "--quant", 0]
    words += ["--state", 1, "--orpo", 1, "--layer_profile", tmp_path / "state.csv", "--lr_advanced", 1]
    words += ["--rlhf_train_file", pairs_csv, "--micro_bsz", 4, "--epoch_steps", 3, "--epoch_count", 1]
    status, _, err = script(train.main, *words, "--state_output_mode", 0)
    assert status == 0, err
    own = read_tensors(tmp_path / "out" / "rwkv-0.pth")
    assert set(own) == {f"blocks.{i}.att.time_state" for i in range(2)} and not (own.keys() & tensors.keys())
    assert all(tensor.abs().max() > 1e-3 for tensor in own.values())  # rates of 0.1, not of 1e-4
    assert not list((tmp_path / "out").glob("*-state*"))


def test_a_run_does_not_write_over_what_it_needs(go, script, base_of, vocab_file, text_jsonl, tmp_path):
    """If this breaks, the cold adapter below a new one is replaced by the new one, and neither can be used again."""
    folder = go("run", "x070", *planned("lora", "none"))
    before = (folder / "rwkv-0.pth").read_bytes()
    words = [
        "--load_model",
        base_of("x070"),
        "--vocab_file",
        vocab_file,
        "--proj_dir",
        folder,
        "--data_file",
        text_jsonl,
    ]
    words += ["--peft", "bone", "--lora_r", 4, "--quant", 0, "--epoch_steps", 1, "--epoch_count", 1, "--force", 1]
    status, _, err = script(train.main, *words, "--load_cold_adapter", folder / "rwkv-0.pth")
    assert status == 2 and "--load_cold_adapter" in err and "would overwrite it" in err
    assert (folder / "rwkv-0.pth").read_bytes() == before
    cold = ["--load_cold_adapter", folder / "rwkv-0.pth", "--epoch_begin", 1]
    status, _, err = script(train.main, *words, *cold)
    assert status == 0, err
    exported = ["--lora_checkpoint", folder / "rwkv-1.pth", "--to_peft", tmp_path / "peft"]
    status, _, err = script(merge.main, *exported)
    assert status == 2 and "over the cold adapter rwkv-0.pth" in err and not (tmp_path / "peft").exists()
