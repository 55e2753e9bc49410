"""merge.py: the merged model is what was trained, whatever the storage; wrong inputs are refused and left alone."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from rwkv_rlhf.checkpoints.adapter_files import AdapterFlags
from rwkv_rlhf.checkpoints.loading import BuildOptions, checkpoint_tensors, load_adapter, load_model, trainable
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.run_folder import trained_tensors
from rwkv_rlhf.checkpoints.sidecar import read_sidecar, sidecar_of, sidecar_path, write_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.plan import Row, make_plan
from tests.support.merging import TOKENS, base_tensors, greedy, logits, plain_logits, run_merge, spread
from tests.support.processes import PACKAGE, package_kind, rwkv_package


def mixed_plan():
    """LoRA of one rank in emb and block 0, of another in head, block 1 full: a scaling for all would be wrong."""
    plan = make_plan("lora", 2, rank=4, alpha=8.0, dropout=0.0, lr_init=1e-4, lr_final=1e-5)

    def row(layer: str, mode: str, rank: int, alpha: float) -> Row:
        return Row(layer, mode, rank, alpha, 0.0, 1e-4, 1e-5, 0.0, 1e-4, 1e-5)

    plan.rows.update(
        {"emb": row("emb", "lora", 4, 2.0), "1": row("1", "full", 0, 0.0), "head": row("head", "lora", 8, 24.0)}
    )
    return plan


def train(
    folder: Path, *, version="x070", dtype=torch.float32, quant="none", plan=None, sidecar=True
) -> tuple[Path, Path]:
    """A base file and a checkpoint "trained" on it by adding noise to all that trains."""
    base, checkpoint = folder / "base.pth", folder / "rwkv-0.pth"
    write_tensors(base_tensors(dtype, version), base)
    plan = plan or mixed_plan()
    model, report = load_model(base, BuildOptions(torch.float32, plan=plan, quant=quant))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.02 if "lora" in name else 0.01))
    write_tensors(trained_tensors(model, report.dtypes, "base"), checkpoint)
    if sidecar:
        write_sidecar(sidecar_of(version, report.layout, plan, base), checkpoint)
    return base, checkpoint


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_each_matrix_gets_its_own_scaling_and_full_rows_replace(tmp_path, suffix):
    """One scaling for all layers was the old merge's silent mistake."""
    base_path, checkpoint = train(tmp_path)
    merged = run_merge(base_path, checkpoint, tmp_path / f"merged{suffix}")
    base, own = read_tensors(base_path), read_tensors(checkpoint)
    assert [(n, t.shape, t.dtype) for n, t in sorted(merged.items())] == [
        (n, t.shape, t.dtype) for n, t in sorted(base.items())
    ]

    def delta(name: str) -> torch.Tensor:
        return own[f"{name}.lora_B"].double() @ own[f"{name}.lora_A"].double()

    def close(name: str, change: torch.Tensor | float) -> None:
        torch.testing.assert_close(merged[name], (base[name].double() + change).float(), msg=name)

    close("blocks.0.ffn.key.weight", 8.0 / 4 * delta("blocks.0.ffn.key"))
    close("head.weight", 24.0 / 8 * delta("head"))
    close("emb.weight", 2.0 / 4 * delta("emb").t())
    for name in ("blocks.1.att.key.weight", "blocks.1.ln1.bias", "blocks.0.ln1.weight", "ln_out.weight"):
        assert torch.equal(merged[name], own[name].reshape(base[name].shape)), name
        assert not torch.equal(merged[name], base[name]), name


@pytest.mark.parametrize("quant", ["none", "nf4", "fp4"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_merged_answers_as_what_was_trained(tmp_path, capsys, quant, dtype, allowed):
    """A quantised run must be merged onto the quantised matrices; bfloat16 files may differ by one rounding."""
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    base, checkpoint = train(tmp_path, dtype=dtype, quant=quant)
    merged = run_merge(base, checkpoint, tmp_path / "merged.pth")
    model, _ = load_model(base, BuildOptions(torch.float32, plan=mixed_plan(), quant=quant))
    load_adapter(model, checkpoint)
    assert spread(logits(model), plain_logits(merged)) <= allowed
    assert spread(logits(model), plain_logits(read_tensors(base))) > 2 * allowed
    together, _ = load_combined(base, checkpoint, BuildOptions(torch.float32))
    assert spread(logits(model), logits(together)) < 1e-6
    assert "differ by at most" in capsys.readouterr().out


def test_frozen_rows_that_were_packed_are_merged_as_they_ran(tmp_path):
    """Rows without an adapter were quantised too: the merged model must be the one that was trained and scored."""
    pytest.importorskip("bitsandbytes")
    plan = make_plan("lora", 2, rank=4, alpha=8.0, layers="1", lr_init=1e-4, lr_final=1e-5)
    base, checkpoint = train(tmp_path, quant="nf4", plan=plan)
    merged = run_merge(base, checkpoint, tmp_path / "merged.pth")
    before = read_tensors(base)
    assert not torch.equal(merged["blocks.0.att.key.weight"], before["blocks.0.att.key.weight"])
    assert torch.equal(merged["emb.weight"], before["emb.weight"])
    assert torch.equal(merged["blocks.0.att.w1"], before["blocks.0.att.w1"])


def test_a_packed_base_is_said_to_have_moved_and_can_be_left_out(tmp_path, capsys):
    """A merge over nf4 moves matrices that nothing trained by a tenth: who does not hear of it blames the training."""
    pytest.importorskip("bitsandbytes")
    plan = make_plan("lora", 2, rank=4, alpha=8.0, layers="1", lr_init=1e-4, lr_final=1e-5)
    base, checkpoint = train(tmp_path, quant="nf4", plan=plan)
    packed, before = run_merge(base, checkpoint, tmp_path / "packed.pth"), read_tensors(base)
    untouched = [f"blocks.0.{name}.weight" for name in ("att.key", "att.output", "ffn.key", "ffn.value")]
    untouched += ["blocks.0.att.value.weight", "blocks.0.att.receptance.weight", "head.weight"]
    squares = [sum(float(t[name].double().square().sum()) for name in untouched) for t in (before, before)]
    squares[0] = sum(float((packed[name].double() - before[name].double()).square().sum()) for name in untouched)
    said = capsys.readouterr().out
    moved = (squares[0] / squares[1]) ** 0.5
    assert f"packing: 7 matrices without an adapter moved by {moved:.1%} (RMS)" in said and 0.05 < moved < 0.15
    assert "--dense 1 merges over the base as it is" in said
    dense = run_merge(base, checkpoint, tmp_path / "dense.pth", "--dense", "1")
    assert all(torch.equal(dense[name], before[name]) for name in untouched)
    own = read_tensors(checkpoint)
    change = own["blocks.1.att.key.lora_B"].double() @ own["blocks.1.att.key.lora_A"].double() * (8.0 / 4)
    wanted = before["blocks.1.att.key.weight"].double() + change
    torch.testing.assert_close(dense["blocks.1.att.key.weight"], wanted.float())
    said = capsys.readouterr().out
    assert "packing:" not in said and "--dense 1: logits of merged and what was trained over nf4 differ by" in said
    with pytest.raises(ValueError, match="--dense with --output"):
        run_merge(base, checkpoint, tmp_path / "m.gguf", "--dense", "1")


def test_checkpoints_of_older_programs_merge_with_flags(tmp_path):
    """They have no sidecar; guessing their scaling would be a silent mistake."""
    plan = make_plan("lora", 2, rank=4, alpha=8.0, lr_init=1e-4, lr_final=1e-5)
    base, checkpoint = train(tmp_path, plan=plan)
    wanted = run_merge(base, checkpoint, tmp_path / "one.pth")
    (tmp_path / "rwkv-0.json").unlink()
    with pytest.raises(ValueError, match=r"no sidecar .*--lora_scaling .* or --lora_alpha"):
        run_merge(base, checkpoint, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"scaling 2.0 and alpha 8.0 say the same"):
        run_merge(base, checkpoint, tmp_path / "two.pth", "--lora_scaling", "2", "--lora_alpha", "8")
    for words in (("--lora_scaling", "2.0"), ("--lora_alpha", "8"), ("--type", "lora", "--lora_scaling", "2")):
        merged = run_merge(base, checkpoint, tmp_path / "two.pth", *words)
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_flags_that_contradict_the_sidecar_are_refused_with_both_values(tmp_path):
    """If this breaks, a typed scaling overrules the one that was trained with, or the user does not see which is
    which."""
    base, checkpoint = train(tmp_path, plan=make_plan("lora", 2, rank=4, alpha=8.0, lr_init=1e-4, lr_final=1e-5))
    run_merge(base, checkpoint, tmp_path / "m.pth", "--lora_scaling", "2.0", "--type", "lora", "--quant", "none")
    for words, sentence in (
        (("--lora_scaling", "1.0"), r"scaling 1.0 contradicts .* scaling 2.0: leave --lora_scaling out"),
        (("--lora_alpha", "16"), r"alpha 16.0 contradicts .* alpha 8.0: leave --lora_alpha out"),
        (("--type", "bone"), "mode bone contradicts .* mode lora: leave --type out"),
        (("--quant", "nf4"), "storage nf4 contradicts .* none matrices: leave --quant out, or --force 1"),
        (("--quant", "int3"), "--quant.* int3"),
        (("--lora_init", "init.pth"), "PiSSA"),
        (("--device", "tpu"), "--device tpu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_merge(base, checkpoint, tmp_path / "other.pth", *words)
    assert not (tmp_path / "other.pth").exists()


def test_another_base_is_refused_unless_forced(tmp_path):
    """The right shapes on the wrong model give plausible nonsense."""
    base, checkpoint = train(tmp_path)
    other = tmp_path / "other.pth"
    write_tensors({name: tensor + 0.001 for name, tensor in read_tensors(base).items()}, other)
    with pytest.raises(
        ValueError, match=r"trained on base.pth \(sha256 \w+\), .*other.pth is another file .*--force 1"
    ):
        run_merge(other, checkpoint, tmp_path / "merged.pth")
    run_merge(other, checkpoint, tmp_path / "merged.pth", "--force", "1")


def test_programs_without_the_flags_of_merge_do_not_hear_of_them(tmp_path):
    """train.py has no --force, no --type and no --base_model: its users would look for them in vain."""
    base, checkpoint = train(tmp_path, plan=make_plan("lora", 2, rank=4, alpha=8.0, lr_init=1e-4, lr_final=1e-5))
    other = tmp_path / "other.pth"
    write_tensors({name: tensor + 0.001 for name, tensor in read_tensors(base).items()}, other)
    sentences = []
    for model, words in (
        (other, {}),
        (base, {"quant": "nf4"}),
        (base, {"scaling": 1.0}),
        (base, {"alpha": 1.0}),
        (base, {"scaling": 2.0, "alpha": 8.0}),
        (base, {}),
    ):
        if len(sentences) == 4:
            (tmp_path / "rwkv-0.json").unlink()
        with pytest.raises(ValueError) as caught:
            load_combined(model, checkpoint, BuildOptions(torch.float32), AdapterFlags(**words))
        sentences.append(str(caught.value))
    assert not [sentence for sentence in sentences if "--" in sentence]
    assert "no sidecar" in sentences[-1] and "trained on base.pth" in sentences[0]


def test_factors_that_were_held_are_merged_too(tmp_path):
    """They began at random: a checkpoint without them is lost."""
    plan = make_plan("lora", 2, rank=4, alpha=8.0, dropout=0.0, lr_init=1e-4, lr_final=1e-5)
    plan.rows["1"] = dataclasses.replace(plan.rows["1"], reject=("lora_A",))
    base, checkpoint = train(tmp_path, plan=plan)
    model, _ = load_model(base, BuildOptions(torch.float32, plan=plan, seed=5))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.01)
    write_tensors({name: parameter.detach() for name, parameter in checkpoint_tensors(model).items()}, checkpoint)
    write_sidecar(read_sidecar(checkpoint), checkpoint)
    merged = run_merge(base, checkpoint, tmp_path / "merged.pth")
    assert spread(logits(model), plain_logits(merged)) <= 1e-5
    again, _ = load_model(base, BuildOptions(torch.float32, plan=plan, seed=6))
    load_adapter(again, checkpoint)
    assert torch.equal(logits(model), logits(again))


def test_an_adapter_of_other_layers_is_refused_by_name(tmp_path):
    """If this breaks, an adapter of a deeper model is merged as far as it fits."""
    base, checkpoint = train(tmp_path, sidecar=False)
    short = {name: tensor for name, tensor in read_tensors(base).items() if not name.startswith("blocks.1.")}
    write_tensors(short, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"rwkv-0.pth was not trained on this base model: .*unexpected: blocks\.1\."):
        run_merge(tmp_path / "short.pth", checkpoint, tmp_path / "merged.pth", "--lora_scaling", "1")


def test_inputs_are_never_overwritten(tmp_path):
    """A typing error must not cost the base model."""
    base, checkpoint = train(tmp_path)
    (tmp_path / "link.pth").symlink_to(base)
    before = base.read_bytes(), checkpoint.read_bytes()
    for name in ("base.pth", "rwkv-0.pth", "link.pth", "../" + tmp_path.name + "/base.pth"):
        with pytest.raises(ValueError, match=r"--output .* is an input"):
            run_merge(base, checkpoint, tmp_path / name)
    for name, sentence in (
        ("merged.bin", "must end in"),
        ("absent/merged.pth", "no folder"),
        ("merged", "must end in"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_merge(base, checkpoint, tmp_path / name)
    assert before == (base.read_bytes(), checkpoint.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKAGE)
def test_the_merged_file_gives_the_same_greedy_answer_in_the_rwkv_package(tmp_path, kind):
    """The whole point of merging: every other RWKV program answers as the trained model does."""
    ours, paths = [], []
    for version in VERSIONS:
        if package_kind(version) == kind:
            folder = tmp_path / version
            folder.mkdir()
            base, checkpoint = train(folder, version=version)
            run_merge(base, checkpoint, folder / "merged.pth")
            ours.append(greedy(base, checkpoint))
            paths.append(str(folder / "merged"))
    assert ours == rwkv_package("greedy", TOKENS, paths, **PACKAGE[kind])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_merges_what_was_trained_over_packed_matrices(tmp_path, version):
    """A matrix or small tensor that only one version has must not be left out, nor change its shape or name."""
    pytest.importorskip("bitsandbytes")
    plan = make_plan("lora", 2, rank=4, alpha=8.0, dropout=0.0, lr_init=1e-4, lr_final=1e-5)
    base, checkpoint = train(tmp_path, version=version, dtype=torch.bfloat16, quant="nf4", plan=plan)
    merged, before = run_merge(base, checkpoint, tmp_path / "merged.pth"), read_tensors(base)
    assert [(n, t.shape, t.dtype) for n, t in merged.items()] == [(n, t.shape, t.dtype) for n, t in before.items()]
    own = read_tensors(checkpoint)
    kept = re.compile(r"emb\.weight|blocks\.0\.(ln0\..*|att\.v[012])|ln_out\..*|.*\.s_emb\.weight")  # v: unused there
    for name, tensor in merged.items():
        if name in own:
            assert torch.equal(tensor, own[name].bfloat16().reshape(tensor.shape)), name
        else:
            assert torch.equal(tensor, before[name]) == bool(kept.fullmatch(name)), name
    model, _ = load_combined(base, checkpoint, BuildOptions(torch.float32))
    assert spread(logits(model), plain_logits(merged)) <= 2e-2


def test_an_adapter_where_a_model_belongs(tmp_path):
    """Swapped arguments, or --load_model P/rwkv-0.pth: the sentence names the base and the flags to type."""
    base, checkpoint = train(tmp_path)
    with pytest.raises(ValueError, match=r"rwkv-0\.pth holds only what was trained above base\.pth, it is no model"):
        run_merge(checkpoint, base, tmp_path / "merged.pth")
    sidecar_path(checkpoint).unlink()
    with pytest.raises(ValueError, match=r"--load_model.*--load_adapter"):
        load_model(checkpoint, BuildOptions(torch.float32))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_head_that_is_the_embedding(tmp_path, suffix):
    """If this breaks, a model whose head shares the memory of its embedding cannot be written as .safetensors."""
    tensors = base_tensors(torch.float32, "x070")
    tensors["head.weight"] = tensors["emb.weight"]
    write_tensors(tensors, tmp_path / f"tied{suffix}")
    found = read_tensors(tmp_path / f"tied{suffix}")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
