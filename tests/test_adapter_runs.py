"""Whole runs with every adapter, version and storage: trained, stopped, gone on with, merged, all the same model."""

import json
import re

import pytest
import torch

import merge
import train
from src.model.checkpoint import build_model, read_tensors
from src.training.folder import NUMBERED
from src.training.merging import load_combined

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
    together = logits(load_combined(base, second / "rwkv-1.pth", compute_dtype=torch.float32)[0])
    merged = read_tensors(output)
    assert spread(together, logits(build_model(merged, compute_dtype=torch.float32)[0])) <= 1e-5
    assert spread(together, logits(build_model(read_tensors(base), compute_dtype=torch.float32)[0])) > 1e-3
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
    assert script(merge.main, *merging[:-1], tmp_path / "o.pth", "--type", "pissa")[0] == 0
    assert all(torch.allclose(t, wanted[name], atol=1e-5) for name, t in read_tensors(tmp_path / "o.pth").items())
