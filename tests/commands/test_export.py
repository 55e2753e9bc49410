"""export.py and merge.py for other programs, as a person types them: the whole way, and what is refused."""

import importlib.util
import json

import pytest
import torch

from rwkv_rlhf.checkpoints.hf_layout import hf_name
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.commands import export, merge, train
from tests.support.merging import trained
from tests.support.models import random_tensors


@pytest.fixture
def words(tmp_path, vocab_file):
    """The flags of an adapter and its model, and their vocabulary."""
    base, checkpoint, _ = trained(tmp_path, "lora")
    return ["--load_model", base, "--load_adapter", checkpoint, "--vocab_file", vocab_file]


def test_an_adapter_goes_to_a_folder_and_comes_back_merged(tmp_path, script, words):
    """model + adapter -> Hugging Face -> .pth is the merged model, bit for bit; the folder is not written twice."""
    status, out, err = script(export.main, *words, "--to", "hf", "--output", tmp_path / "hf", "--check", 0)
    assert status == 0 and "exported base.pth with" in out, err
    back = ["--load_model", tmp_path / "hf", "--to", "rwkv", "--output", tmp_path / "back.pth"]
    status, _, err = script(export.main, *back)
    assert status == 0, err
    merged = tmp_path / "merged.pth"
    merge.main(["--base_model", str(words[1]), "--lora_checkpoint", str(words[3]), "--output", str(merged)])
    found, wanted = torch.load(tmp_path / "back.pth", weights_only=True), torch.load(merged, weights_only=True)
    assert found.keys() == {name for name in wanted if hf_name(name)}  # block 0 has no value mixing there
    wanted = {name: wanted[name] for name in found}
    assert all(
        torch.equal(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in wanted.items()
    )
    status, _, err = script(export.main, *words, "--to", "hf", "--output", tmp_path / "hf", "--check", 0)
    assert status == 2 and "hf exists already; name a folder that does not exist" in err


def test_the_chat_template_is_the_one_that_was_trained_with(tmp_path, script, words):
    """The sidecar names it; --template says another one. If this breaks, a think model is asked without its cue."""
    sidecar = words[3].with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"template": "g1"}))
    for folder, more in (("g1", []), ("world", ["--template", "world"])):
        asked = [*words, "--to", "hf", "--output", tmp_path / folder, "--check", 0, *more]
        status, _, err = script(export.main, *asked)
        assert status == 0, err
        written = (tmp_path / folder / "chat_template.jinja").read_text()
        assert ("<think" in written) == (folder == "g1") and ("rwkv-world" in written) == (folder == "world")


def test_merge_writes_what_export_writes(tmp_path, script, words, vocab_file):
    """merge.py --output X.st is export.py by the suffix; flags that only merging knows are refused."""
    one, two = tmp_path / "one.st", tmp_path / "two.st"
    status, _, err = script(export.main, *words, "--to", "web_rwkv", "--output", one)
    assert status == 0, err
    named = ["--base_model", words[1], "--lora_checkpoint", words[3], "--output", two]
    status, _, err = script(merge.main, *named)
    assert status == 0 and one.read_bytes() == two.read_bytes(), err
    status, _, err = script(merge.main, *named, "--layer_filter", "0")
    assert status == 2 and "--layer_filter with --output" in err and "then export.py" in err


def test_a_run_in_shards_is_merged_into_shards(tmp_path, script, typed, text_jsonl, base_model):
    """--save_format sharded: checkpoints of a run, --keep, merging, and training on from what was merged."""
    more = ["--data_file", text_jsonl, "--peft", "lora", "--save_format", "sharded", "--keep", 1, "--epoch_save", 1]
    status, _, err = script(train.main, *typed, *more, "--epoch_count", 2)
    assert status == 0, err
    folder = tmp_path / "out"
    saved = {path.name for path in folder.glob("rwkv-*")}
    assert "rwkv-1.safetensors.index.json" in saved and "rwkv-1.json" in saved
    assert not [name for name in saved if name.startswith("rwkv-0")] and not [*folder.glob(".new-*")]
    output = tmp_path / "merged.safetensors.index.json"
    checkpoint = folder / "rwkv-1.safetensors.index.json"
    status, _, err = script(merge.main, "--base_model", base_model, "--lora_checkpoint", checkpoint, "--output", output)
    assert status == 0 and read_tensors(output).keys() == read_tensors(base_model).keys(), err
    typed[1] = output
    status, _, err = script(train.main, *typed, *more[:4], "--proj_dir", tmp_path / "more")
    assert status == 0, err


REFUSED = {
    "no model": (["--to", "gguf"], "--to gguf needs --load_model"),
    "no adapter": (["--to", "peft"], "--to peft takes an adapter: --load_adapter"),
    "unknown target": (["--to", "onnx"], "invalid choice: 'onnx'"),
    "unknown suffix": (["--load_model", "M", "--to", "gguf"], "out.bin: the name must end in .gguf with --to gguf"),
    "unknown type": (["--load_model", "M", "--to", "web_rwkv", "--dtype", "q8_0"], "--dtype q8_0 with --to web_rwkv"),
    "no shard": (["--load_model", "M", "--to", "rwkv", "--shard_size", 0], "--shard_size 0.0: must be larger than 0"),
    "no judge": (["--load_model", "M", "--to", "rwkv", "--check", 1], "no program here that could run --to rwkv"),
    "old version": (["--load_model", "OLD", "--to", "gguf"], "--to gguf holds x060 and x070 models, this is x040"),
    "an input": (["--load_model", "M", "--to", "rwkv", "--output", "M"], "is the input file itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_said_in_one_sentence(tmp_path, refused, monkeypatch, case):
    """Nothing is written and no input changes; the sentence says what is legal."""
    words, sentence = REFUSED[case]
    suffix = ".pth" if "rwkv" in words else ".st" if "web_rwkv" in words else ".gguf" if "OLD" in words else ".bin"
    files = {"M": ("x070", 64), "OLD": ("x040", 64)}
    for name, (version, head) in files.items():
        if name in words:
            write_tensors(random_tensors(version, 2, 64, 300, head), tmp_path / f"{name}.pth")
    named = [tmp_path / f"{word}.pth" if word in files else word for word in words]
    output = [] if "--output" in words else ["--output", tmp_path / f"out{suffix}"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name != "gguf" else name)
    refused([*named, *output], sentence, main=export.main)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", "."))]


def test_a_missing_package_is_named(tmp_path, refused, monkeypatch):
    """If this breaks, who has not installed an extra gets a traceback."""
    write_tensors(random_tensors("x070", 2, 64, 300, 64), tmp_path / "m.pth")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("gguf", "rwkv7_hf") else there(name, *rest)
    )
    words = ["--load_model", tmp_path / "m.pth", "--to"]
    refused([*words, "gguf", "--output", tmp_path / "m.gguf"], "pip install gguf", main=export.main)
    asked = [*words, "hf", "--output", tmp_path / "hf", "--check", 1]
    refused(asked, "--check 1 with --to hf needs rwkv7-hf: pip install rwkv7-hf", main=export.main)
