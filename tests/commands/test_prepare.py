"""The preparing scripts as a user runs them: what they write, and how they refuse."""

import json

import pytest
import torch

from rwkv_rlhf.commands import make_binidx, prepare_pairs
from rwkv_rlhf.data.sampler import magic_prime
from rwkv_rlhf.data.text.binidx import Corpus
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.model.initial import initial_tensors
from tests.support.processes import started

CSV = "prompt,chosen,reject\nHi,Hello.,Go away.\nTwo?,2,Three\n"


def test_prepare_orpo(tmp_path):
    """The command of the tradition writes records that its programs read, and a sidecar that explains them."""
    (tmp_path / "in.csv").write_text(CSV)
    words = ["--input_csv", str(tmp_path / "in.csv"), "--target_pair_count", "5"]
    prepare_pairs.main([*words, "--output_save", str(tmp_path / "a.save")])
    records = torch.load(tmp_path / "a.save", weights_only=True)
    world = load_tokenizer(65536)
    texts = {tuple(world.decode(part) for part in record[:3]) for record in records}
    assert len(records) == 5
    assert texts == {
        ("User: Hi\n\nAssistant:", " Hello.\n\n", " Go away.\n\n"),
        ("User: Two?\n\nAssistant:", " 2\n\n", " Three\n\n"),
    }
    assert {record[3:] for record in records} == {(0.5, 0.5)}
    about = json.loads((tmp_path / "a.save.json").read_text())
    assert (about["template"], about["reference"], about["model"], about["records"]) == ("world", None, None, 5)
    prepare_pairs.main([*words, "--output_save", str(tmp_path / "b.save")])
    assert (tmp_path / "a.save").read_bytes() == (tmp_path / "b.save").read_bytes()


@pytest.mark.slow
def test_mistakes_end_with_status_2_and_leave_files_alone(tmp_path):
    """The script under its other name: one sentence on stderr, no traceback, no file."""
    source = tmp_path / "in.csv"
    source.write_text("prompt,answer,reject\na,b,c\n")
    words = ("--input_csv", source, "--output_save", tmp_path / "out" / "a.save")
    process = started("rlhf_generate_save.py", *words, fresh=True)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "in.csv:2 (row 1): " in err and "of which chosen is missing" in err and "Traceback" not in err
    assert not list(tmp_path.glob("**/*.save*"))


def test_output_is_checked_before_the_work(tmp_path):
    """An unwritable folder and the input as output are refused."""
    source = tmp_path / "in.csv"
    source.write_text(CSV)
    (same := tmp_path / "in.save").symlink_to(source)
    for target, message in ((source / "a.save", "cannot be written"), (same, "is the input file itself")):
        with pytest.raises(ValueError, match=message):
            prepare_pairs.main(["--input_csv", str(source), "--output_save", str(target)])
    assert source.read_text() == CSV


def test_the_vocabulary_comes_from_the_model(tmp_path):
    """A checkpoint of another vocabulary asks for its file; a missing one is a sentence."""
    source = tmp_path / "in.csv"
    source.write_text(CSV)
    words = ["--input_csv", str(source), "--output_save", str(tmp_path / "a.save"), "--load_model"]
    with pytest.raises(ValueError, match=r"none\.pth"):
        prepare_pairs.main([*words, str(tmp_path / "none.pth")])
    model, vocabulary = str(tmp_path / "m.pth"), tmp_path / "v.txt"
    torch.save(initial_tensors("x070", 1, 64, 300, 64, 0), model)
    with pytest.raises(ValueError, match=r"vocab_size 300 .*--vocab_file"):
        prepare_pairs.main([*words, model])
    with pytest.raises(ValueError, match=r"--vocab_size 65536, but .*m\.pth has a vocabulary of 300"):
        prepare_pairs.main([*words, model, "--vocab_size", "65536"])
    vocabulary.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    prepare_pairs.main([*words, model, "--vocab_file", str(vocabulary), "--target_pair_count", "1"])
    record = torch.load(tmp_path / "a.save", weights_only=True)[0]
    assert bytes(i - 1 for i in record[0]).endswith(b"Assistant:")


def test_make_binidx(tmp_path, script, caplog):
    """Documents end with 0, every repeat holds all of them, the prime fits, and the same seed gives the same bytes."""
    texts = [f"text {i}\r\n\r\nwith lines " + "w " * i for i in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    words = ["--input", str(tmp_path / "in.jsonl"), "--repeats", "3", "--ctx_len", "8"]
    caplog.set_level("INFO")
    status, _, err = script(make_binidx.main, *words, "--output", tmp_path / "c")
    assert status == 0, err
    corpus, world = Corpus(tmp_path / "c", 65536), load_tokenizer(65536)
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    assert len(documents) == 36
    assert all(document[-1] == 0 for document in documents)
    found = [world.decode_bytes(document).decode() for document in documents]
    assert sorted(found[:12]) == sorted(found[12:24]) == sorted(found[24:]) == sorted(texts)
    assert found[:12] != found[12:24]
    assert f"--magic_prime {magic_prime(len(corpus.tokens), 8)}" in caplog.text
    make_binidx.main([*words, "--output", str(tmp_path / "d.bin")])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"d{suffix}").read_bytes()


def test_composed_text_is_the_same_text(tmp_path):
    """If this breaks, no document with a decomposed letter can be prepared under the 20B vocabulary, which composes."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = enumerate(["<|endoftext|>", *tokenizers.pre_tokenizers.ByteLevel.alphabet()])
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in letters}, []))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "cafe\u0301"}) + "\n")
    words = ["--input", str(source), "--vocab_file", str(tmp_path / "tokenizer.json"), "--vocab_size", "257"]
    make_binidx.main([*words, "--output", str(tmp_path / "c")])
    assert len(Corpus(tmp_path / "c").document(0)) == len("caf\u00e9".encode()) + 1


def test_make_binidx_refuses(tmp_path):
    """A line without text, and a file without any: named, and nothing written."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"content": "b"}\n')
    words = ["--input", str(source), "--output", str(tmp_path / "c")]
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*its keys are content; the shapes are text"):
        make_binidx.main(words)
    with pytest.raises(ValueError, match="--repeats 0"):
        make_binidx.main([*words, "--repeats", "0"])
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    make_binidx.main([*words, "--skip_bad"])
    assert len(Corpus(tmp_path / "c")) == 1
