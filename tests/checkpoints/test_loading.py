"""Checkpoint files: what is refused and in which words, strict loading, atomic writing, sidecars."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_rlhf.checkpoints.loading import (
    BuildOptions,
    build_model,
    file_sizes,
    load_adapter,
    load_model,
    trainable,
    unused_tensors,
)
from rwkv_rlhf.checkpoints.partial import completed
from rwkv_rlhf.checkpoints.sidecar import (
    check_whole,
    read_sidecar,
    sidecar_of,
    sidecar_path,
    write_checkpoint,
    write_sidecar,
)
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.sizes import check_flags, sizes_of
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.settings.tables import OTHER_VERSIONS
from tests.support.models import random_tensors


def tiny(n_layer: int = 2) -> dict[str, torch.Tensor]:
    return initial_tensors("x070", n_layer, 64, 40, 32, 0)


def lora_plan(n_layer: int = 2, **changes):
    settings = {"rank": 4, "alpha": 8.0, "lr_init": 1e-4, "lr_final": 1e-5} | changes
    return make_plan("lora", n_layer, **settings)


class Bomb:
    """What unpickling this would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def write_bad_files(folder: Path) -> dict[str, str]:
    """Bad checkpoints, and words that the sentence about each must hold."""
    torch.save(tiny(), folder / "good.pth")
    save_file(tiny(), folder / "good.safetensors")
    good = (folder / "good.pth").read_bytes()
    (folder / "half.pth").write_bytes(good[: len(good) // 2])
    (folder / "stub.pth").write_bytes(good[:600])
    (folder / "hole.pth").write_bytes(good[:90] + bytes(3000) + good[3090:])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("prompt,chosen\n" * 50)
    (folder / "half.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:5000])
    (folder / "text.safetensors").write_text("no header here at all")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    torch.save({"a": Bomb(folder / "executed")}, folder / "bomb.pth")
    torch.save({"a": Bomb(folder / "executed")}, folder / "oldbomb.pth", _use_new_zipfile_serialization=False)
    (folder / "pickle.pth").write_bytes(pickle.dumps({"a": Bomb(folder / "executed")}))
    torch.save([torch.ones(2)], folder / "list.pth")
    torch.save({}, folder / "nothing.pth")
    torch.save({"emb.weight": 3}, folder / "number.pth")
    torch.save({"conv.weight": torch.ones(3)}, folder / "other.pth")
    torch.save({k: v for k, v in tiny().items() if not k.startswith("blocks.0.att")}, folder / "headless.pth")
    (folder / "folder.pth").mkdir()
    for name in ("pointer.pth", "pointer.safetensors"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    return {
        "absent.pth": "does not exist",
        "folder.pth": "is a folder",
        "pointer.pth": "is a Git LFS pointer, not the file itself: git lfs pull brings it",
        "pointer.safetensors": "is a Git LFS pointer",
        "half.pth": "cut off",
        "stub.pth": "cut off",
        "hole.pth": "damaged or not a checkpoint",
        "empty.pth": "not a checkpoint (0 bytes)",
        "text.pth": "not a checkpoint",
        "zip.pth": "not a checkpoint",
        "half.safetensors": "not a whole safetensors file",
        "text.safetensors": "not a whole safetensors file",
        "bomb.pth": "mkdir",
        "oldbomb.pth": "mkdir",
        "pickle.pth": "not a checkpoint",
        "list.pth": "holds a list",
        "nothing.pth": "an empty dict",
        "number.pth": "'emb.weight' is a int",
        "other.pth": "not an RWKV checkpoint: it has no emb.weight",
        "headless.pth": "not a known RWKV version",
    }


def test_bad_files_are_refused_in_one_sentence_and_nothing_is_executed(tmp_path):
    """A stranger's file must not run code, and a truncated download must not look like a bug of ours."""
    for name, words in write_bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=name) as caught:
            file_sizes(tmp_path / name)
        sentence = str(caught.value)
        assert words in sentence and name in sentence and "\n" not in sentence, sentence
        assert len(sentence) < 300 + len(str(tmp_path)), sentence
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_formats_read_back_what_was_written(tmp_path, suffix):
    """If this breaks, a checkpoint that was saved has other numbers, or other names, when it is read."""
    path = tmp_path / f"m{suffix}"
    tensors = {**tiny(), "view": torch.arange(12.0).view(3, 4).t()[1:3]}
    write_tensors(tensors, path)
    back = read_tensors(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_view_is_saved_without_what_lies_behind_it(tmp_path):
    """An adapter file of a large model would hold the large model."""
    write_tensors({"a": torch.zeros(1_000_000)[:10]}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_old_pickles_of_tensors_and_deepspeed_s_prefix_are_read(tmp_path):
    """Checkpoints of 2021 are still around."""
    old = {f"_forward_module.{name}": tensor for name, tensor in tiny().items()}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert sizes_of(read_tensors(tmp_path / "old.pth")).n_layer == 2


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    """A full disk in the middle of a save must not cost the last good checkpoint."""
    path = tmp_path / "m.pth"
    write_tensors({"a": torch.ones(3)}, path)

    class Broken(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"m\.pth: the disk is full"):
        write_tensors({"a": torch.ones(3).as_subclass(Broken)}, path)
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]
    with pytest.raises(ValueError, match="cannot be written"):
        write_tensors({"a": torch.ones(1)}, path / "inside a file" / "m.pth")


def test_sizes_are_read_from_the_tensors():
    """If this breaks, a user must type sizes that the file holds, or gets a model of another shape."""
    sizes = sizes_of(initial_tensors("x070", 3, 128, 50, 64, 0))
    assert (sizes.version, sizes.n_layer, sizes.n_embd, sizes.vocab_size) == ("x070", 3, 128, 50)
    assert (sizes.head_size, sizes.dim_att, sizes.dim_ffn, sizes.n_head) == (64, 128, 512, 2)
    assert set(sizes.low_rank) == {"w", "a", "v", "g"}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_is_recognised_and_no_other(version):
    """A model that is taken for its neighbour (5.1 for 5.2) would run with the wrong decays."""
    tensors = random_tensors(version, 2, 64, 40, 16)
    sizes = sizes_of(tensors)
    wide = 224 if version[1:4] in ("050", "051", "052", "060") else 256
    assert (sizes.version, sizes.n_layer, sizes.n_embd, sizes.vocab_size) == (version, 2, 64, 40)
    assert (sizes.head_size, sizes.dim_att, sizes.dim_ffn) == (1 if version == "x040" else 16, 64, wide)
    of_7 = {"w", "a", "v", "g"}
    expected = {"x060": {"mix", "decay"}, "x070": of_7, "x070a": {*of_7, "deep"}}.get(version, set())
    assert sizes.low_rank.keys() == expected


def test_other_shapes_of_rwkv_5():
    """One number per head may come as (H, 1, 1), the bonus as its logarithm under another name; one head is legal."""
    tensors = random_tensors("x051", 2, 64, 40, 16)
    for name in [name for name in tensors if name.endswith("time_faaaa")]:
        tensors[name.replace("faaaa", "first")] = tensors.pop(name).view(4, 1, 1)
    for name in [name for name in tensors if name.endswith("time_decay")]:
        tensors[name] = tensors[name].view(4, 1, 1)
    sizes = sizes_of(tensors)
    assert (sizes.version, sizes.head_size, sizes.bonus) == ("x051", 16, "time_first")
    build_model(tensors, BuildOptions(torch.float32))
    assert sizes_of(random_tensors("x052", 2, 64, 40, 64)).version == "x052"
    assert sizes_of(random_tensors("x050", 2, 64, 40, 64)).head_size == 64


def changed(version: str, **parts: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A model whose `blocks.*.att` has other tensors: None takes one away."""
    tensors = random_tensors(version, 2, 64, 40, 16)
    for part, value in parts.items():
        for block in range(2):
            tensors.pop(f"blocks.{block}.att.{part}", None)
            tensors |= {f"blocks.{block}.att.{part}": value} if value is not None else {}
    return tensors


@pytest.mark.parametrize(
    "tensors",
    [
        changed("x060", time_maa_w1=None),
        changed("x052", time_faaaa=None),
        changed("x050", time_decay=torch.zeros(4, 16)),  # a decay per channel without a gate was never released
        changed("x040", time_first=None),
        changed("x070", r_k=None),
    ],
    ids=["x060", "x052", "x050", "x040", "x070"],
)
def test_a_version_that_nobody_knows_is_refused(tensors):
    """An experiment of the past must not run as something that it is not."""
    with pytest.raises(ValueError, match=r"not a known RWKV version \(x040, x050, x051, x052, x060, x070, x070a\)"):
        sizes_of(tensors)


def test_experiments_of_rwkv_4_are_refused_by_the_names_of_their_tensors(tmp_path):
    """--pre_ffn 1 or --head_qk 1 models: ignoring what they add would give nonsense."""
    extra = {"head_q.weight": torch.zeros(8, 64), "head_k.weight": torch.zeros(8, 64)}
    torch.save(random_tensors("x040", 2, 64, 40) | extra, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"is not an x040 model of 2 layers: 2 unexpected: head_q.weight"):
        load_model(tmp_path / "m.pth", BuildOptions(torch.float32))


def test_a_typed_size_that_disagrees_names_both_numbers():
    """The flag would otherwise be ignored in silence."""
    sizes = sizes_of(tiny())
    check_flags(sizes, n_layer=2, n_embd=64, version="x070", dim_ffn=0, head_size=None)
    with pytest.raises(ValueError, match=r"--n_layer is 24 but the checkpoint has n_layer 2"):
        check_flags(sizes, n_layer=24)
    with pytest.raises(ValueError, match=r"--my_testing is x060 but the checkpoint has version x070"):
        check_flags(sizes, version="x060")


def test_missing_unexpected_and_misshapen_tensors_are_grouped_and_counted(tmp_path):
    """Loading with strict=False once hid missing keys: half a model trained on random numbers."""
    tensors = tiny()
    for name in [name for name in tensors if name.startswith("blocks.1.ffn")]:
        del tensors[name]
    tensors["blocks.0.att.extra"] = torch.ones(1)
    tensors["ln_out.bias"] = torch.ones(3)
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="x070") as caught:
        load_model(tmp_path / "m.pth", BuildOptions(torch.float32))
    sentence = str(caught.value)
    assert "3 missing: blocks.1.ffn.x_k, blocks.1.ffn.key.weight, blocks.1.ffn.value.weight" in sentence
    assert "1 unexpected: blocks.0.att.extra" in sentence
    assert "1 of the wrong shape: ln_out.bias (3,) instead of (64,)" in sentence


def test_unused_factors_of_block_0_may_be_there_or_not(tmp_path):
    """Files of both kinds are in circulation."""
    with_them = tiny()
    for name in ("v0", "v1", "v2"):
        with_them.setdefault(f"blocks.0.att.{name}", with_them[f"blocks.1.att.{name}"].clone())
    without = {name: t for name, t in with_them.items() if not name.startswith("blocks.0.att.v")}
    without["blocks.0.att.value.weight"] = with_them["blocks.0.att.value.weight"]
    for tensors in (with_them, without):
        torch.save(tensors, tmp_path / "m.pth")
        load_model(tmp_path / "m.pth", BuildOptions(torch.float32))


def test_small_vectors_may_be_flat(tmp_path):
    """Converters of other programs store (C,) where the tradition has (1, 1, C)."""
    tensors = {name: t.flatten() if t.dim() == 3 else t for name, t in tiny().items()}
    torch.save(tensors, tmp_path / "m.pth")
    model, _ = load_model(tmp_path / "m.pth", BuildOptions(torch.float32))
    assert model.blocks[0].att.x_r.shape == (1, 1, 64)


def test_loading_gives_the_file_s_values_and_survives_its_removal(tmp_path):
    """The model must not live in pages of a file that somebody else rewrites."""
    tensors = tiny()
    torch.save(tensors, tmp_path / "m.pth")
    model, report = load_model(tmp_path / "m.pth", BuildOptions(torch.float32, plan=lora_plan()))
    (tmp_path / "m.pth").write_bytes(bytes((tmp_path / "m.pth").stat().st_size))
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, tensors[name].reshape(tensor.shape)), name
    assert report.dtypes.keys() == {name for name in model.state_dict() if "lora_" not in name}


def test_an_adapter_resumes_exactly_and_others_are_refused_by_name(tmp_path):
    """The adapter of an embedding row was once silently not loaded; one for other layers must not half load."""
    torch.save(tiny(), tmp_path / "m.pth")

    def fresh(n_layer=2, seed=0, **changes):
        torch.save(tiny(n_layer), tmp_path / "m.pth")
        plan = lora_plan(n_layer, **changes)
        return load_model(tmp_path / "m.pth", BuildOptions(torch.float32, plan=plan, seed=seed))[0]

    model = fresh()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_()
    write_tensors({name: p.detach() for name, p in trainable(model).items()}, tmp_path / "rwkv-0.pth")
    again = fresh(seed=9)
    load_adapter(again, tmp_path / "rwkv-0.pth")
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in trainable(again).items())
    with pytest.raises(ValueError, match=r"rwkv-0.pth is not an adapter .*missing: blocks\.2\."):
        load_adapter(fresh(n_layer=3), tmp_path / "rwkv-0.pth")
    with pytest.raises(ValueError, match=r"wrong shape: .*lora_A \(4, 64\) instead of \(8, 64\)"):
        load_adapter(fresh(rank=8), tmp_path / "rwkv-0.pth")


def test_a_sidecar_reads_back_as_it_was_written(tmp_path):
    """Merging reads rank and scaling from it: a loss here is a wrong merge."""
    base = tmp_path / "base.pth"
    torch.save(tiny(), base)
    adapted = {"blocks.0.att.key": Adaptation.make("lora", 4, 6), "head": Adaptation.make("lora", 8, 8, 0.1)}
    layout = Layout(adapted, frozenset({"blocks.0.att.key"}), frozenset({"ln_out.weight"}), "nf4")
    sidecar = sidecar_of("x070", layout, lora_plan(), base)
    path = write_sidecar(sidecar, tmp_path / "rwkv-0.pth")
    assert path == tmp_path / "rwkv-0.json" and sidecar_path("a/rwkv-1.safetensors") == Path("a/rwkv-1.json")
    back = read_sidecar(tmp_path / "rwkv-0.pth")
    assert (back.adapted, set(back.packed), back.quant_mode) == (adapted, layout.packed, "nf4")
    assert back.base_sha256 == file_hash(base) and back.base_file == "base.pth" and back.version == "x070"
    content = json.loads(path.read_text())
    assert content["adapted"]["blocks.0.att.key"]["scaling"] == 1.5
    assert [row["layer"] for row in content["plan"]] == ["emb", "0", "1", "head"]
    assert content["state_layout"] == "value x key" and content["program_version"]


def test_a_checkpoint_without_or_with_a_broken_sidecar(tmp_path):
    """If this breaks, a damaged sidecar is taken for none and an adapter is merged with guessed settings."""
    assert read_sidecar(tmp_path / "rwkv-0.pth") is None
    for text in ("{", "[]", '{"format": 1}', '{"format": 1, "adapted": {"a": {"rnk": 1}}, "packed": [], "plan": []}'):
        (tmp_path / "rwkv-0.json").write_text(text)
        with pytest.raises(ValueError, match=r"rwkv-0.json is not a sidecar"):
            read_sidecar(tmp_path / "rwkv-0.pth")
    (tmp_path / "rwkv-0.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        read_sidecar(tmp_path / "rwkv-0.pth")


def test_a_kill_during_a_save_leaves_the_older_checkpoint_with_its_sidecar(tmp_path, monkeypatch):
    """If this breaks, `rwkv-best` with the sidecar of another one is refused as damaged, and the best model is lost."""
    torch.save(tiny(), tmp_path / "base.pth")
    sidecar = sidecar_of("x070", Layout({}, frozenset(), frozenset(), "none"), None, tmp_path / "base.pth")
    path = tmp_path / "run" / "rwkv-best.pth"
    write_checkpoint({"head.weight": torch.zeros(2)}, sidecar, path)

    def killed(checkpoint):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rwkv_rlhf.checkpoints.sidecar.file_hash", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint({"head.weight": torch.ones(2)}, sidecar, path)
    check_whole(read_sidecar(path), path)
    assert not torch.load(path, weights_only=True)["head.weight"].any()
    assert sorted(file.name for file in path.parent.iterdir()) == ["rwkv-best.json", "rwkv-best.pth"]


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("model.", "model."),
        ("_forward_module.model._orig_mod.", "_forward_module.model., _orig_mod."),
    ],
)
def test_names_that_wrappers_of_a_model_changed(tmp_path, caplog, prefix, said):
    """Lightning, DDP and torch.compile leave their names in what they save; the model in it is the same."""
    write_tensors({prefix + name: tensor for name, tensor in tiny().items()}, tmp_path / "m.pth")
    for _ in range(2):
        assert read_tensors(tmp_path / "m.pth").keys() == tiny().keys()
    assert caplog.text.count("m.pth: names without ") == 1 and f"names without {said}, which" in caplog.text
    write_tensors(
        {"blocks.0._orig_mod.att.k_k": torch.ones(1), "module.blocks.0.att.k_k": torch.ones(1)}, tmp_path / "t.pth"
    )
    with pytest.raises(ValueError, match=r"t.pth holds blocks.0.att.k_k twice"):
        read_tensors(tmp_path / "t.pth")


@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_versions_that_are_not_built_are_refused_by_their_names(tmp_path, version):
    """A list of unexpected tensors tells nobody that the model is another one."""
    more = {f"blocks.0.{sign}": torch.ones(2, 2) for sign in OTHER_VERSIONS[version]}
    write_tensors(tiny() | more, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=re.escape(f"m.pth: {version}, as blocks.0.")):
        file_sizes(tmp_path / "m.pth")


def test_what_a_base_lacks_begins_at_initial_values(tmp_path, caplog):
    """--load_partial 1: each missing tensor is named, has the sizes of the file, and is the same for the same seed."""
    wide = {
        name: torch.cat([t, t], 1 if name.endswith("1") else 0)
        for name, t in tiny(3).items()
        if name[-2:] in ("w1", "w2")
    }
    whole = tiny(3) | wide  # a low rank that no formula gives
    lost = [f"blocks.1.att.{name}" for name in ("w0", "w1", "w2", "key.weight")] + ["blocks.2.ffn.x_k", "ln_out.bias"]
    path = tmp_path / "partial.pth"
    write_tensors({name: tensor for name, tensor in whole.items() if name not in lost}, path)
    sizes = file_sizes(path)
    read = completed(lambda: read_tensors(path), sizes, path, 5)
    assert f"lacks 6 tensors, which begin at initial values: {', '.join(lost)}" in caplog.text
    found, again = read(), completed(lambda: read_tensors(path), sizes, path, 5)()
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in whole.items()}
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(torch.equal(found[name], whole[name]) for name in found if name not in lost)
    for name in ("blocks.1.att.w0", "blocks.2.ffn.x_k", "ln_out.bias"):  # values without chance
        assert torch.equal(found[name], whole[name]), name
    assert build_model(found, BuildOptions(torch.float32))[1].frozen > 0
    assert completed(read, sizes, path, 5) is read


def test_whole_models_of_rwkv_7_keep_what_rwkv_lm_asks_for(tmp_path):
    """RWKV-LM loads strictly: without the unused factors of block 0 a checkpoint from here does not go on there."""
    unused = [f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")]
    tensors = tiny()
    model, _ = build_model(tensors, BuildOptions(torch.float32))
    kept = unused_tensors(model, tensors)
    assert {*kept} == {*unused} and all(torch.equal(kept[name], tensors[name]) for name in unused)
    released = {name: tensor for name, tensor in tensors.items() if name not in unused}
    model, _ = build_model(released, BuildOptions(torch.float32))
    made = unused_tensors(model, released)
    assert {name: t.shape for name, t in made.items()} == {name: tensors[name].shape for name in unused}
    assert not any(t.any() for t in made.values())
    other = random_tensors("x060")
    assert unused_tensors(build_model(other, BuildOptions(torch.float32))[0], other) == {}
