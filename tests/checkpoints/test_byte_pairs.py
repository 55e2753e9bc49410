"""Vocabularies in tokenizer.json's form in exports, judged by transformers and llama.cpp."""

import json

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from rwkv_rlhf.checkpoints.exporters.byte_pairs import byte_pairs
from rwkv_rlhf.checkpoints.exporting import About, ExportOptions, Vocabulary, export_model, open_exported
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.commands import export, merge
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates.template import WORLD
from rwkv_rlhf.data.tokenizer import load_tokenizer
from tests.support.models import random_tensors
from tests.support.processes import llama_cpp_prompts

TURNS = [Turn("system", "Be kind."), Turn("user", "Hi\nthere"), Turn("assistant", "Hello"), Turn("user", "Bye")]
SAID = [{"role": role, "content": text} for role, text, *_ in TURNS]
TEXTS = ["Hello well he'll\n\n  x", "\u4f60\u597d \U0001f600 caf\u00e9", "a<|im_end|>b", " <tool>  1234"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "w"), ("\u0120w", "e"), ("\u010a", "\u010a")]


def write_tokenizer(path, **changes):
    """A small byte-pair vocabulary whose byte n is id n + 1, with marks of chats and one that is added to each text."""
    byte = {
        one: ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(one))[0][0] for one in range(128)
    }
    rest = iter(sorted(set(ByteLevel.alphabet()) - set(byte.values())))
    vocab = {byte.get(one) or next(rest): one + 1 for one in range(256)}
    vocab |= {"".join(pair): 257 + at for at, pair in enumerate(MERGES)}
    vocab["<|endoftext|>"] = 0
    marks = {"<|endoftext|>": 0, "<|im_start|>": 263, "<|im_end|>": 264, "<tool>": 265}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": at, "content": word, "special": word != "<tool>", **flags} for word, at in marks.items()]
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    adding = {"type": "TemplateProcessing", "single": [start, text], "pair": [text, text]}
    adding["special_tokens"] = {"<|im_start|>": {"id": "<|im_start|>", "ids": [263], "tokens": ["<|im_start|>"]}}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in MERGES], "dropout": None}
    model |= {"unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    whole |= {"pre_tokenizer": cut, "post_processor": adding, "decoder": cut, "model": model | {"byte_fallback": False}}
    path.write_text(json.dumps(whole | changes))
    return path


@pytest.fixture
def exported(tmp_path):
    """The vocabulary's file, our tokenizer, and a model with it that is to be exported."""
    file = write_tokenizer(tmp_path / "vocabulary.json")
    tokenizer = load_tokenizer(300, str(file))
    write_tensors(random_tensors("x070", 2, 64, 300, 64), tmp_path / "model.pth")
    vocabulary = Vocabulary({}, tuple(tokenizer.encode(WORLD.end)), WORLD.as_jinja(), tokenizer.text)
    return tokenizer, open_exported(tmp_path / "model.pth", None, vocabulary, About("tiny"))


@pytest.mark.slow
def test_transformers_has_the_ids_of_the_training(exported, tmp_path):
    """If this breaks, a model is asked in other ids than it has learnt, or a mark is put before each text."""
    transformers = pytest.importorskip("transformers", reason="a test dependency of its own (requirements-test.txt)")
    ours, model = exported
    export_model("hf", model, tmp_path / "hf", ExportOptions("f32", 1 << 30, check=False))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*TEXTS, WORLD.prompt(TURNS)):
        assert theirs(text)["input_ids"] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == 0 and not (tmp_path / "hf" / "rwkv_vocab.txt").exists()
    assert theirs.apply_chat_template(SAID, tokenize=False, add_generation_prompt=True) == WORLD.prompt(TURNS)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [0, 262]


@pytest.mark.slow
def test_llama_cpp_has_the_ids_of_the_training(exported, tmp_path):
    """If this breaks, llama.cpp cuts a text otherwise than the training did, and answers from another prompt."""
    for module in ("gguf", "xllamacpp"):
        pytest.importorskip(module, reason=f"{module} is a test dependency of its own (requirements-test.txt)")
    ours, model = exported
    export_model("gguf", model, tmp_path / "out.gguf", ExportOptions("f32", 1 << 30, check=False))
    ids = [ours.encode(text) for text in [*TEXTS, WORLD.prompt(TURNS)]]
    found = llama_cpp_prompts(tmp_path / "out.gguf", [*TEXTS, SAID, *ids])
    assert [count for count, _ in found] == 2 * [len(one) for one in ids]
    for as_text, as_ids in zip(found[: len(ids)], found[len(ids) :], strict=True):
        likely = dict(as_ids[1])
        both = {number: value for number, value in as_text[1] if number in likely}
        assert len(both) > 15 and both == pytest.approx({number: likely[number] for number in both}, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 1}}}, "the model of this one is WordLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "this one has the normalizer Lowercase"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "this one has the pre_tokenizer ByteLevel",
        ),
        ({"pre_tokenizer": None}, "this one has the pre_tokenizer None"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(tmp_path, changes, said):
    """If this breaks, a file is written in which the same text is other ids, and nobody is told."""
    with pytest.raises(ValueError, match=f"{said}.*--to hf takes it"):
        byte_pairs(write_tokenizer(tmp_path / "vocabulary.json", **changes).read_text())


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (export.main, "--to gguf --check 0 --load_model {model}"),
        (merge.main, "--base_model {model} --lora_checkpoint {model} --force 1"),
    ],
)
def test_a_file_that_cannot_be_carried_leaves_nothing(script, tmp_path, command, flags):
    """If this breaks, half a file lies there, or merging by suffix says nothing of the vocabulary."""
    file = write_tokenizer(tmp_path / "vocabulary.json", normalizer={"type": "Lowercase"})
    write_tensors(random_tensors("x070", 2, 64, 300, 64), tmp_path / "model.pth")
    words = flags.format(model=tmp_path / "model.pth").split()
    status, _, err = script(command, *words, "--vocab_file", file, "--output", tmp_path / "out.gguf")
    assert status == 2 and "normalizer Lowercase" in err and not (tmp_path / "out.gguf").exists()


def test_a_vocabulary_goes_into_files_for_other_programs_only(script, tmp_path):
    """If this breaks, somebody believes that a .pth holds the vocabulary that was named."""
    write_tensors(random_tensors("x070", 2, 64, 300, 64), tmp_path / "model.pth")
    words = ["--base_model", tmp_path / "model.pth", "--lora_checkpoint", tmp_path / "model.pth"]
    words += ["--output", tmp_path / "out.pth", "--vocab_file", tmp_path / "model.pth"]
    status, _, err = script(merge.main, *words)
    assert status == 2 and "--vocab_file: only a file for another program holds it, --output in .gguf" in err
