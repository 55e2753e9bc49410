"""Vocabularies: the ids that every released World model expects, and files that a user may name."""

import functools
import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_rlhf.data.tokenizer import MUCH, TrieTokenizer, _in_rust, load_tokenizer, world_vocabulary_file


def test_ids_are_those_of_the_released_models(world):
    """Another id for `User` or the blank line would train a model on a language of its own."""
    assert [world.encode(text) for text in ("\n\n", "User", ":")] == [[261], [24281], [59]]
    assert world.encode("User: x\n\nAssistant:") == [24281, 59, 355, 261, 5585, 41693, 59]
    assert world.encode("") == []


@pytest.mark.slow  # the package takes its time to read its own vocabulary
def test_ids_agree_with_the_rwkv_package(world):
    """The package's own trie is the judge, on text of many scripts, code and long runs."""
    judge = TRIE_TOKENIZER(str(world_vocabulary_file()))
    texts = [
        "RWKV \u306f RNN \u3067\u3059\u3002\r\n\t",
        "na\u00efve caf\u00e9 \u2014 42%",
        " " * 300 + "-" * 200,
        "x = {'a': [1, 2]}\n" * 3,
        "\x00\x7f\U0001f600",
    ]

    @settings(max_examples=60, deadline=None)
    @given(st.text())
    def same(text):
        assert world.encode(text) == judge.encode(text)

    same()
    for text in texts:
        assert world.encode(text) == judge.encode(text)


@pytest.fixture(scope="module")
def slow(world):
    """The World vocabulary without other programs."""
    return TrieTokenizer(world.words, 65536, "slow")


@pytest.fixture(scope="module")
def much(world):
    """The World vocabulary after so much text that the package in Rust is asked."""
    assert importlib.util.find_spec("pyrwkv_tokenizer"), "requirements.txt has it"
    tokenizer = TrieTokenizer(world.words, 65536, "world", functools.partial(_in_rust, world_vocabulary_file()))
    tokenizer.encode("a")
    assert "_fast" not in vars(tokenizer), "the package is loaded for a few words, which takes longer than they do"
    tokenizer.encode("a" * MUCH)
    assert vars(tokenizer)["_fast"]
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_the_package_in_rust_gives_the_same_ids(much, slow, text):
    """If this breaks, data prepared where pyrwkv-tokenizer is installed are other tokens than elsewhere."""
    assert much.encode(text) == slow.encode(text)


def test_any_string_can_be_encoded_and_any_id_decoded(world):
    """NUL, a lone surrogate from a JSON escape, or an id without a word must not stop a run."""
    assert world.decode(world.encode("a\x00b")) == "a\x00b"
    assert world.decode_bytes(world.encode("\ud800")) == b"\xed\xa0\x80"
    assert world.decode([0, 65535, 24281]) == "User"
    assert world.decode(world.encode("\u00e9")[:1]) in ("\u00e9", "\ufffd")
    assert load_tokenizer(65536) is world


def test_trie_vocabulary_of_another_size(tmp_path):
    """A small model brings its own vocabulary; the longest word wins."""
    path = tmp_path / "small.txt"
    path.write_text("1 'a' 1\n2 'ab' 2\n3 b'\\xff' 1\n4 'b' 1\n", encoding="utf-8")
    small = load_tokenizer(5, str(path))
    assert small.encode("aabb") == [1, 2, 4]
    assert small.decode_bytes([3, 2]) == b"\xffab"
    with pytest.raises(ValueError, match=r"small.txt.* byte 0x7a"):
        small.encode("az")


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        ("1 'a' 1\n2 __import__('os').getcwd() 9\n", 9, r"v.txt:2: not a vocabulary line"),
        ("1 'a' 2\n", 9, r"v.txt:1: the length"),
        ("1 'a' 1\n1 'b' 1\n", 9, r"v.txt:2: id 1 is taken"),
        ("0 'a' 1\n", 9, r"v.txt:1: id 0 is kept"),
        ("9 'a' 1\n", 9, r"v.txt has id 9, but the model's vocab_size is 9"),
        ("", 9, "no words"),
    ],
)
def test_bad_vocabulary_files(tmp_path, lines, size, message):
    """Lines are parsed, never evaluated, and every mistake names file and line."""
    path = tmp_path / "v.txt"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(size, str(path))


def test_other_sizes_need_a_file():
    """Training RWKV-4 Pile on World ids would be silent nonsense."""
    with pytest.raises(ValueError, match=r"vocab_size 50277.*--vocab_file"):
        load_tokenizer(50277)
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        load_tokenizer(50277, "none.txt")


def test_hugging_face_tokenizer(tmp_path):
    """A tokenizer.json works where the package is installed; an id outside the model is refused."""
    pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "hello": 1, "world": 2, "<unk>": 3}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    parts = {"added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None, "truncation": None}
    text = {"version": "1.0", "padding": None, "pre_tokenizer": {"type": "Whitespace"}, "model": model, **parts}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(text))
    found = load_tokenizer(4, str(path))
    assert found.encode("hello world") == [1, 2]
    assert found.decode([1, 2, 0]) == "hello world"
    with pytest.raises(ValueError, match="has id 3, but the model's vocab_size is 3"):
        load_tokenizer(3, str(path))
    for word, refused in (("!", True), ("[PAD]", False), ("<s>", False)):
        path.write_text(json.dumps(text | {"model": model | {"vocab": {word: 0, "hello": 1, "world": 2, "<unk>": 3}}}))
        load_tokenizer.cache_clear()
        if refused:  # sampling would stop at "!", and decoding drop it
            with pytest.raises(ValueError, match=r"id 0 is the word '!'"):
                load_tokenizer(4, str(path))
        else:
            assert load_tokenizer(4, str(path)).encode("hello") == [1]
