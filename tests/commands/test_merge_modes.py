"""merge.py for every adapter and storage: old files, parts of an adapter, the PEFT library, other RWKV programs."""

import json

import pytest
import torch

from rwkv_rlhf.checkpoints.adapter_files import initial_factors
from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model, load_adapter, load_model, trainable
from rwkv_rlhf.checkpoints.merge_shares import parse_merge_shares
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.run_folder import trained_tensors
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.commands import merge
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.settings.tables import ADAPTERS
from tests.support.merging import (
    TOKENS,
    base_tensors,
    greedy,
    logits,
    plain_logits,
    plan_of,
    run_merge,
    spread,
    trained,
)
from tests.support.processes import rwkv_package


@pytest.mark.parametrize("mode", [*ADAPTERS, "state"])
@pytest.mark.parametrize("quant", ["none", *STORES])
def test_every_adapter_over_every_storage_is_merged_as_it_ran(tmp_path, mode, quant):
    """Two rounded models that differ would be two models; PiSSA's residual is what is packed, not the matrix."""
    if quant in ("nf4", "fp4", "int8"):
        pytest.importorskip("bitsandbytes")
    base, checkpoint, model = trained(tmp_path, mode, quant=quant)
    merged = run_merge(base, checkpoint, tmp_path / "merged.safetensors")
    assert spread(logits(model), plain_logits(merged)) <= 1e-5
    assert spread(logits(model), plain_logits(read_tensors(base))) > 1e-3


@pytest.mark.parametrize("mode", ["pissa", "bone", "dora"])
def test_a_bf16_base_is_merged_within_one_rounding(tmp_path, mode):
    """Sums in bfloat16 would lose the update."""
    base, checkpoint, model = trained(tmp_path, mode, dtype=torch.bfloat16)
    merged = run_merge(base, checkpoint, tmp_path / "merged.pth")
    for name, tensor in read_tensors(base).items():
        assert merged[name].dtype == tensor.dtype
    weight = model.get_submodule("blocks.1.ffn.key").merged()
    if mode != "pissa":  # the layer that ran has its residual rounded to the dtype of computation, float32 here
        assert torch.equal(merged["blocks.1.ffn.key.weight"], weight.bfloat16())
    assert spread(logits(model), plain_logits(merged)) <= 2e-2


def test_the_modes_of_old_checkpoints_are_told_by_their_tensors(tmp_path):
    """They have no sidecar: rank and mode are read from names and shapes, a scale is only asked for where one is."""
    for mode, words in (
        ("bone", ()),
        ("miss", ()),
        ("bone", ("--type", "bone")),
        ("dora", ("--lora_alpha", "16")),
        ("dora", ("--type", "dora", "--lora_scaling", "2")),
        ("state", ("--type", "state")),
    ):
        folder = tmp_path / f"{mode}{len(words)}"
        folder.mkdir()
        base, checkpoint, _ = trained(folder, mode)
        wanted = run_merge(base, checkpoint, folder / "one.pth")
        (folder / "rwkv-0.json").unlink()
        if mode == "dora":
            with pytest.raises(ValueError, match="no sidecar"):
                run_merge(base, checkpoint, folder / "two.pth")
        with pytest.raises(ValueError, match="mode pissa, but the tensors are those of"):
            run_merge(base, checkpoint, folder / "two.pth", "--type", "pissa")
        merged = run_merge(base, checkpoint, folder / "two.pth", *words)
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_an_old_dora_adapter_has_a_length_a_column(tmp_path):
    """lora_M (1, in) has as many numbers as (out,) of a square matrix: read as that it is another model, in silence."""
    base, checkpoint, _ = trained(tmp_path, "dora")
    model, report = load_model(base, BuildOptions(torch.float32, plan=plan_of("dora")))
    for name in report.layout.adapted:
        model.get_submodule(name).per_column()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    write_tensors(trained_tensors(model, report.dtypes, "base"), checkpoint)
    sidecar = checkpoint.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": ""}))  # that of the file before
    again, _ = load_model(base, BuildOptions(torch.float32, plan=plan_of("dora")))
    load_adapter(again, checkpoint)
    assert torch.equal(logits(again), logits(model))
    assert all(parameter.requires_grad for name, parameter in again.named_parameters() if "lora_M" in name)
    assert spread(logits(model), plain_logits(run_merge(base, checkpoint, tmp_path / "m.pth"))) <= 1e-5
    together, _ = load_combined(base, checkpoint, BuildOptions(torch.float32))
    assert spread(logits(model), logits(together)) <= 1e-6


@pytest.mark.parametrize("mode", ["lora", "pissa", "bone", "state", "full"])
def test_a_filter_merges_some_layers_and_weighs_others(tmp_path, capsys, mode):
    """--layer_filter: what is not named stays as in the base, a factor moves that share of the way from it."""
    base, checkpoint, _ = trained(tmp_path, mode)
    before, whole = read_tensors(base), run_merge(base, checkpoint, tmp_path / "whole.pth")
    assert "differ by at most" in capsys.readouterr().out
    upper = run_merge(base, checkpoint, tmp_path / "upper.pth", "--layer_filter", "1")
    assert "differ by at most" in capsys.readouterr().out
    for name in upper:
        assert torch.equal(upper[name], whole[name] if name.startswith("blocks.1.") else before[name]), name
    if mode == "state":
        assert "blocks.0.att.time_state" not in upper
    partly = run_merge(base, checkpoint, tmp_path / "partly.pth", "--layer_filter", "0.25*0, 1 head")
    assert "no trained model to compare" in capsys.readouterr().out
    for name in partly:
        from_base = before.get(name, torch.zeros_like(whole[name]))
        wanted = from_base
        if name.startswith("blocks.0.") and ".ln0." not in name:
            wanted = from_base + 0.25 * (whole[name] - from_base)
        elif not name.startswith(("emb", "blocks.0.")):
            wanted = whole[name]
        assert torch.allclose(partly[name], wanted, atol=1e-7), name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0-2", "'0-2' is not within blocks 0-1"),
        ("1 0-1", "'0-1' names row 1 a second time"),
        ("-1*0", "'-1[*]0' is not rows such as"),
        ("x*0", "is not rows"),
        ("1e999*0", "is not rows"),
        ("tail", "is not rows"),
        ("0*0-1", "leaves every layer as in the base"),
        ("", "leaves every layer as in the base"),
    ],
)
def test_filters_that_mean_nothing_are_refused(text, sentence):
    """If this breaks, a mistyped share merges another amount than the user meant."""
    with pytest.raises(ValueError, match=sentence):
        parse_merge_shares(text, 2)


@pytest.mark.parametrize("mode", ["lora", "pissa", "dora", "miss"])
def test_adapters_go_to_the_peft_library_and_back(tmp_path, capsys, mode):
    """An adapter that comes back must be the same; what PEFT has no place for must be said."""
    base, checkpoint, model = trained(tmp_path, mode, limited=True)
    folder = tmp_path / "peft"
    assert merge.main(["--base_model", str(base), "--lora_checkpoint", str(checkpoint), "--to_peft", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    back = tmp_path / "back.pth"
    assert merge.main(["--base_model", str(base), "--from_peft", str(folder), "--output", str(back)]) == 0
    assert "12 adapters" in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "back.json").read_text())
    assert sidecar["adapted"]["blocks.0.att.key"]["rank"] == (16 if mode == "pissa" else 8)
    merged = run_merge(base, back, tmp_path / "merged.pth")
    assert spread(logits(model), plain_logits(merged)) <= 1e-5


def test_what_the_peft_library_cannot_hold_is_said(tmp_path, caplog):
    """If this breaks, trained tensors are lost in an export without a word."""
    base, checkpoint, _ = trained(tmp_path, "lora")
    words = ["--base_model", str(base), "--lora_checkpoint", str(checkpoint)]
    merge.main([*words, "--to_peft", str(tmp_path / "peft")])
    assert "51 trained tensors have no place in a PEFT adapter" in caplog.text
    for other, sentence in (
        (["--from_peft", str(tmp_path / "no"), "--output", str(tmp_path / "x.pth")], "one task"),
        (["--to_peft", "a", "--output", "b.pth"], "one task"),
        (["--to_peft", "a", "--dense", "1"], "--dense 1 is about merging"),
        ([], "--output is missing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            merge.main([*words, *other])
    bone = tmp_path / "bone"
    bone.mkdir()
    base, checkpoint, _ = trained(bone, "bone")
    with pytest.raises(ValueError, match="mode bone has no form in the PEFT library"):
        merge.main(["--lora_checkpoint", str(checkpoint), "--to_peft", str(bone / "peft")])
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json"):
        merge.main(["--base_model", str(base), "--from_peft", str(tmp_path / "peft"), "--output", str(bone / "x.pth")])


@pytest.mark.slow
@pytest.mark.parametrize("v7", [False, True])
def test_other_programs_answer_as_the_adapter_did(tmp_path, v7):
    """PiSSA, Bone and DoRA merged into a file that the `rwkv` package runs, with the same greedy answer."""
    ours, paths = [], []
    runs = [("x070", "pissa"), ("x070", "bone")] if v7 else [("x040", "dora"), ("x052", "miss"), ("x060", "bone")]
    for version, mode in runs:
        folder = tmp_path / f"{version}{mode}"
        folder.mkdir()
        base, checkpoint, _ = trained(folder, mode, version=version)
        run_merge(base, checkpoint, folder / "merged.pth")
        ours.append(greedy(base, checkpoint))
        paths.append(str(folder / "merged"))
    assert ours == rwkv_package("greedy", TOKENS, paths, v7=v7)


def formula(mode, r, out, inner):
    """Numbers that train for an (out, in) matrix: arXiv 2106.09685 section 4.2, 2404.02948 section 3 (the same shapes),
    2409.15371 (Bone in r x r blocks of the input; MiSS r rows of the output), 2402.09353 (LoRA and a length a row)."""
    return {
        "lora": r * (out + inner),
        "pissa": r * (out + inner),
        "bone": inner // r * r * r,
        "miss": r * out,
        "dora": r * (out + inner) + out,
    }[mode]


@pytest.mark.parametrize("mode", ADAPTERS)
def test_what_trains_is_as_much_as_the_papers_say(mode):
    """A factor of the wrong shape trains, and merges, and is another method: count it for RWKV-7's matrices."""
    width, r, layers = 128, 8, 2
    tensors = base_tensors(torch.float32)
    model, report = build_model(tensors, BuildOptions(torch.float32, plan=plan_of(mode), limited=True))
    square, up, down = (formula(mode, r, *shape) for shape in ((width, width), (4 * width, width), (width, 4 * width)))
    assert report.trained == layers * (4 * square + up + down)
    assert len(initial_factors(model)) == (2 * 6 * layers if mode == "pissa" else 0)
