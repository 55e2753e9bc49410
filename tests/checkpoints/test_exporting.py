"""Whole models for other programs, judged by these: llama.cpp, transformers, MLX. Their tensors read back by us."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rwkv_rlhf.checkpoints import exporting
from rwkv_rlhf.checkpoints.exporting import About, ExportOptions, Vocabulary, check_target, export_model, open_exported
from rwkv_rlhf.checkpoints.hf_layout import hf_name, own_name
from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates.template import WORLD
from rwkv_rlhf.data.tokenizer import WORLD_SIZE, TrieTokenizer, load_tokenizer
from rwkv_rlhf.files import file_hash, fingerprint
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.settings.exports import EXPORTS
from tests.support.merging import logits, trained
from tests.support.models import random_tensors
from tests.support.processes import llama_cpp_prompts

MODELS = [name for name, facts in EXPORTS.items() if facts.target]
JUDGED = [
    (name, version, dtype)
    for name in MODELS
    if EXPORTS[name].target.judge
    for version in EXPORTS[name].target.versions
    for dtype in EXPORTS[name].target.dtypes
    if dtype == "f32" or (name == "gguf" and version == "x070")
]
WORDS = {number + 1: bytes([number]) for number in range(256)} | {257: b"\n\n", 258: b"\xe2\x82", 259: b"'\""}
VOCABULARY = Vocabulary(WORDS, (257,), WORLD.as_jinja())
ABOUT = About("tiny", "model.pth", "apache-2.0", "https://example.org/tiny")
WHOLE = ExportOptions("f32", 1 << 30, check=False)


def need(name):
    """Skips where the program that judges `name`, or the package that writes it, is not installed."""
    target = EXPORTS[name].target
    for module in filter(None, (target.needs, *target.judge_needs.values())):
        pytest.importorskip(
            module,
            reason=f"{module} is a test dependency of its own (requirements-test.txt, or tests/requirements-mlx.txt)",
        )


def model_of(folder, version="x070", **sizes):
    """A file in which every tensor shows in the logits, and the same opened for an export."""
    path = folder / "model.pth"
    write_tensors(random_tensors(version, 2, **{"n_embd": 128, "vocab_size": 300, "head_size": 64} | sizes), path)
    return path, open_exported(path, None, VOCABULARY, ABOUT)


def place_of(name, folder):
    """Where a test writes what is exported."""
    return folder / f"out{(EXPORTS[name].target.suffixes or ('',))[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("name, version, dtype", JUDGED)
def test_the_other_program_answers_as_this_one(tmp_path, name, version, dtype):
    """If this breaks, an exported model loads and talks nonsense: two factors interchanged, one not transposed."""
    need(name)
    _, model = model_of(tmp_path, version)
    said = export_model(name, model, place_of(name, tmp_path), ExportOptions(dtype, 1 << 30, check=True))
    found = float(said.split("at most ")[1].split()[0])
    assert found < (1e-5 if dtype == "f32" else exporting.TOLERANCE[dtype]), said
    assert place_of(name, tmp_path).exists()


@pytest.mark.slow
def test_nothing_is_kept_that_its_judge_contradicts(tmp_path):
    """If this breaks, a wrong file looks like a good one: here receptance and key are interchanged."""
    need("gguf")
    _, model = model_of(tmp_path)
    wrong = {"receptance": "key", "key": "receptance"}

    def read():
        tensors = read_tensors(tmp_path / "model.pth")
        return {
            name: tensors[".".join(wrong.get(word, word) for word in name.split("."))] if "att" in name else tensor
            for name, tensor in tensors.items()
        }

    mixed_up = exporting.ExportedModel(model.shapes, read, model.run, VOCABULARY, ABOUT)
    with pytest.raises(
        ValueError, match=r"xllamacpp gives other log-probabilities than this program: .*nothing was kept"
    ):
        export_model("gguf", mixed_up, tmp_path / "out.gguf", ExportOptions("f32", 1 << 30, check=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.slow
def test_a_trained_adapter_is_in_what_is_exported(tmp_path):
    """The model is compared with base and adapter as they ran in training, packed matrices included."""
    need("gguf")
    base, checkpoint, _ = trained(tmp_path, "lora", quant="fp8")
    model = open_exported(base, checkpoint, VOCABULARY, ABOUT)
    said = export_model("gguf", model, tmp_path / "out.gguf", ExportOptions("f32", 1 << 30, check=True))
    assert float(said.split("at most ")[1].split()[0]) < 1e-5, said
    plain = open_exported(base, None, VOCABULARY, ABOUT)
    assert (exporting.own_logprobs(plain) - exporting.own_logprobs(model)).abs().max() > 1e-2


def test_a_gguf_file_says_what_llama_cpp_asks(tmp_path):
    """The sizes, the words byte for byte, what ends an answer, the licence: read by the package gguf."""
    gguf = pytest.importorskip("gguf", reason="gguf is an extra of its own (requirements.txt)")
    _, model = model_of(tmp_path)
    export_model("gguf", model, tmp_path / "out.gguf", ExportOptions("q8_0", 1 << 30, check=False))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "rwkv7" and said["rwkv7.wkv.head_size"] == 64
    assert (said["rwkv7.block_count"], said["rwkv7.embedding_length"], said["rwkv7.feed_forward_length"]) == (
        2,
        128,
        512,
    )
    assert (said["general.license"], said["general.source.url"]) == (ABOUT.licence, ABOUT.source)
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"]) == (0, 257)
    words, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(words) == len(types) == 300 and types[0] == 3 and set(types[260:]) == {5}
    assert words[257] == r"\n\n" and words[258] == r"\xe2\x82" and words[259] == "\\'\""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.channel_mix_key.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.time_mix_w1.weight"] == kinds["blk.0.time_mix_lerp_fused.weight"] == "F32"
    assert kinds["blk.1.time_mix_g1.weight"] == "F16"
    assert "rwkv-world" in said["tokenizer.chat_template"]


@pytest.mark.parametrize("shard", [1 << 30, 100_000])
def test_a_folder_of_hugging_face_is_read_back_bit_for_bit(tmp_path, shard):
    """Model -> folder, in one file or in shards -> model: the same names, shapes and bits, to be trained on again."""
    path, model = model_of(tmp_path)
    folder = tmp_path / "hf"
    export_model("hf", model, folder, ExportOptions("", shard, check=False))
    before = {name: tensor for name, tensor in read_tensors(path).items() if hf_name(name)}
    after = read_tensors(folder)
    assert sizes_of(after) == sizes_of(before) and after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape and torch.equal(tensor, after[name]), name
    again, _ = load_model(folder, BuildOptions(torch.float32))
    assert torch.equal(logits(again), logits(load_model(path, BuildOptions(torch.float32))[0]))
    config = json.loads((folder / "config.json").read_text())
    assert (config["head_dim"], config["num_heads"], config["intermediate_size"]) == (64, 2, 512)
    files = sorted(file.name for file in folder.glob("*.safetensors*"))
    if shard < 1 << 30:
        assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
        assert max(file.stat().st_size for file in folder.glob("*.safetensors")) < 2 * shard + 400_000
        again = read_tensors(folder / files[-1])
        assert again.keys() == after.keys()
        (folder / files[0]).unlink()
        with pytest.raises(ValueError, match="cannot be read"):
            read_tensors(folder)
    else:
        assert files == ["model.safetensors"] and read_tensors(folder / files[0]).keys() == after.keys()


@pytest.mark.parametrize("name", random_tensors("x070", 2))
def test_a_name_there_is_a_name_here(name):
    """If this breaks, one tensor is lost on the way there and back."""
    theirs = hf_name(name)
    assert (own_name(theirs) if theirs else name) == name
    assert theirs or name.startswith("blocks.0.att.v")


def test_a_stranger_s_folder_is_refused_in_one_sentence(tmp_path):
    """If this breaks, a folder with something else in it ends in a traceback, or in half a model."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="is a folder with no model"):
        read_tensors(folder)
    from_elsewhere = {"model.embeddings.weight": torch.ones(3, 4), "lm_head.weight": torch.ones(3, 4)}
    write_tensors(from_elsewhere | {"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, folder / "a.safetensors")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is no tensor of RWKV-7"):
        read_tensors(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"with 2 models \(a\.safetensors, b\.safetensors\)"):
        read_tensors(folder)
    for content in ('{"weight_map": {"x": "../a.safetensors"}}', '{"weight_map": {}}', "[]", "{"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index of safetensors"):
            read_tensors(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(ValueError, match="1 tensor is in the index and in none of its files, such as x"):
        read_tensors(folder)


def test_a_folder_has_a_hash_and_a_fingerprint_of_its_weights(tmp_path):
    """If this breaks, an adapter is laid over another model than it was trained on without a word."""
    _, model = model_of(tmp_path)
    seen = set()
    for number in range(2):
        folder = tmp_path / str(number)
        export_model("hf", model, folder, ExportOptions("", 100_000, check=False))
        seen |= {file_hash(folder), fingerprint(folder)}
    assert len(seen) == 2
    with open(sorted(folder.glob("*.safetensors"))[1], "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert file_hash(folder) not in seen and fingerprint(folder) not in seen


@pytest.mark.slow
def test_llama_cpp_reads_text_and_chats_as_this_program(tmp_path):
    """The World vocabulary in the file gives our ids, and its chat template writes what we trained on."""
    need("gguf")
    tokenizer = load_tokenizer(WORLD_SIZE)
    path = tmp_path / "model.pth"
    write_tensors(random_tensors("x070", 2, 64, WORLD_SIZE, 64), path)
    vocabulary = Vocabulary(tokenizer.words, tuple(tokenizer.encode(WORLD.end)), WORLD.as_jinja())
    model = open_exported(path, None, vocabulary, ABOUT)
    export_model("gguf", model, tmp_path / "out.gguf", ExportOptions("f16", 1 << 30, check=False))
    assert vocabulary.end == (261,)
    texts = [
        "Hello\n\nUser: 2",
        "  two\t\r\n x",
        "\u4f60\u597d\uff0c\u4e16\u754c \U0001f600 \xa0e\u0301",
        "f'\\n\\x41 \"`",
    ]
    turns = [Turn("system", "Be kind."), Turn("user", "Hi\nthere"), Turn("assistant", "Hello"), Turn("user", "Bye")]
    said = [{"role": role, "content": text.replace("\n", "\r\n \n")} for role, text, *_ in turns]
    ids = [tokenizer.encode(text) for text in [*texts, WORLD.prompt(turns)]]
    found = llama_cpp_prompts(tmp_path / "out.gguf", [*texts, said, *ids])
    assert [count for count, _ in found] == 2 * [len(one) for one in ids]
    for as_text, as_ids in zip(found[: len(ids)], found[len(ids) :], strict=True):
        assert [number for number, _ in as_text[1]] == [number for number, _ in as_ids[1]]
        assert [value for _, value in as_text[1]] == pytest.approx([value for _, value in as_ids[1]], abs=1e-3)


@pytest.mark.slow
def test_transformers_reads_and_writes_text_as_this_program(tmp_path):
    """The tokenizer in the folder has our ids, and its chat template writes what we trained on."""
    transformers = pytest.importorskip("transformers", reason="a test dependency of its own (requirements-test.txt)")
    _, model = model_of(tmp_path)
    export_model("hf", model, tmp_path / "hf", WHOLE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ours = TrieTokenizer(WORDS, 300, "test")
    text = 'two\n\nlines, "\'" and \u20ac'
    assert theirs(text)["input_ids"] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.vocab_size, theirs.decode([0], skip_special_tokens=True)) == (0, 300, "")
    turns = [Turn("system", "Be kind."), Turn("user", "Hi\nthere"), Turn("assistant", "Hello"), Turn("user", "Bye")]
    said = [{"role": role, "content": text.replace("\n", "\r\n \n")} for role, text, *_ in turns]
    written = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert written == WORLD.prompt(turns)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert ends == [0, 257]


@pytest.mark.parametrize("version", EXPORTS["web_rwkv"].target.versions)
def test_a_file_for_web_rwkv_is_what_its_loader_asks(tmp_path, version):
    """Names, type and turned factors of web-rwkv's loader (Loader::info tells inner widths by first dimensions)."""
    path, model = model_of(tmp_path, version)
    export_model("web_rwkv", model, tmp_path / "out.st", ExportOptions("f16", 1 << 30, check=False))
    (tmp_path / "out.st").rename(tmp_path / "out.safetensors")
    found, own = load_file(tmp_path / "out.safetensors"), read_tensors(path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16} and len(found) == len(own)
    sizes, att = sizes_of(own), "blocks.0.att."
    if version == "x060":
        assert found[f"{att}time_mix_w1"].shape[0] == 5 * sizes.low_rank["mix"]
        assert found[f"{att}time_decay_w1"].shape[0] == sizes.low_rank["decay"]
        assert found[f"{att}time_first"].shape[0] == sizes.n_head
        assert torch.equal(found[f"{att}time_mix_w2"], own[f"{att}time_maa_w2"].half().transpose(1, 2))
    else:
        assert [found[f"{att}{name}1"].shape[0] for name in "wag"] == [sizes.low_rank[name] for name in "wag"]
        assert torch.equal(found["blocks.1.att.v2"], own["blocks.1.att.v2"].half().t())
    assert torch.equal(found[f"{att}key.weight"], own[f"{att}key.weight"].half())


@pytest.mark.parametrize("name", ["gguf", "hf", "web_rwkv"])
def test_a_number_that_f16_cannot_hold_is_refused(tmp_path, name):
    """If this breaks, an infinity is written where no judge is installed, and the model answers nothing."""
    if EXPORTS[name].target.needs:
        pytest.importorskip(EXPORTS[name].target.needs, reason="an extra of its own (requirements.txt)")
    tensors = random_tensors("x070", 2, 64, 300, 64)
    tensors["blocks.1.ffn.value.weight"][3, 5] = 1e5
    write_tensors(tensors, tmp_path / "model.pth")
    model = open_exported(tmp_path / "model.pth", None, VOCABULARY, ABOUT)
    with pytest.raises(ValueError, match=r"1\.\S*value\.weight has numbers beyond 65504"):
        export_model(name, model, place_of(name, tmp_path), ExportOptions("f16", 1 << 30, check=False))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    "name, sizes, dtype, words",
    [
        ("gguf", {"version": "x052"}, "f16", "holds x060 and x070 models, this is x052"),
        ("hf", {"version": "x060"}, "", "holds x070 models, this is x060"),
        ("hf", {"head_size": 32}, "", "holds heads of 64 channels, this model has 32"),
        ("gguf", {"head_size": 32}, "f16", "holds heads of 64 or 128 channels, this model has 32"),
        ("web_rwkv", {"n_layer": 1}, "f16", "holds models of at least 2 blocks, this has 1"),
        ("hf", {}, "q8_0", "--dtype q8_0 with --to hf: must be one of f32, f16, bf16"),
        ("hf", {"states": True}, "", r"no place for learnt initial states \(att\.time_state\)"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(name, sizes, dtype, words):
    """If this breaks, a file is written that its program refuses, or runs as another model."""
    shape = {"version": "x070", "n_layer": 2, "n_embd": 64, "vocab_size": 300, "head_size": 64} | sizes
    states = shape.pop("states", False)
    tensors = random_tensors(**shape)
    if states:
        tensors["blocks.0.att.time_state"] = torch.zeros(1, 64, 64)
    with pytest.raises(ValueError, match=words):
        check_target(name, sizes_of(tensors), dtype)
