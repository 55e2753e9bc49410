"""Preference files as people really have them, through train.py: trained on as meant, refused by line, or counted."""

import json
import logging

import pytest
import torch

from rwkv_rlhf.commands import score_pairs, train
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.pairs.dataset import open_pairs
from rwkv_rlhf.data.pairs.save import read_save, write_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.text.documents import open_text
from rwkv_rlhf.data.tokenizer import load_tokenizer
from tests.support.files import JINJA, VOCAB, read_jsonl, write_csv

pytestmark = pytest.mark.slow


@pytest.fixture
def typed(base_model, vocab_file, tmp_path):
    """One step of DPO; the file comes behind."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / "out"),
        *("--precision", "fp32", "--quant", 0, "--ctx_len", 64, "--epoch_steps", 1, "--epoch_count", 1, "--grad_cp", 0),
        *("--random_mode", 0, "--dpo", 1, "--rlhf_train_file"),
    ]


@pytest.fixture
def letters(vocab_file):
    return load_tokenizer(VOCAB, str(vocab_file))


@pytest.fixture
def trained(script, typed, tmp_path, caplog):
    """trained(path, words): the run must succeed; gives its training records and what it said."""

    def call(path, *words):
        caplog.clear()
        caplog.set_level(logging.INFO)
        status, _, err = script(train.main, *typed, path, *words)
        assert status == 0, err
        return read_jsonl(tmp_path / "out" / "metrics.jsonl", "train"), caplog.text

    return call


ROWS = [["say a", "gladly a", "no a"], ["say b", "gladly b", "no b"]]


def test_identical_answers(script, typed, trained, tmp_path):
    """A pair that prefers nothing: named by line, or counted."""
    path = write_csv(tmp_path / "p.csv", [*ROWS, ["say c", " same\n", "same"]])
    status, _, err = script(train.main, *typed, path)
    assert status == 2 and f"{path}:4" in err and "identical" in err and "--skip_bad 1" in err
    _, said = trained(path, "--skip_bad", 1)
    assert "3 rows, 2 pairs" in said and "skipped 1: identical answers" in said


def test_a_reject_longer_than_the_cap(trained, tmp_path, letters):
    """It keeps its start, is counted, and its reference score is that of what is left (margin 0 at the start)."""
    path = write_csv(tmp_path / "p.csv", [["say a", "gladly", "no " * 400]])
    steps, said = trained(path, "--rlhf_max_corpus_len", 40)
    assert "reject cut in 1 row" in said and "chosen cut" not in said
    assert abs(steps[0]["reward_margin"]) < 1e-6
    pair = open_pairs(path, letters, max_len=40)[0]
    assert letters.decode(pair.reject) == (" " + "no " * 20)[:40]


def test_a_prompt_that_fills_the_context(trained, tmp_path, letters):
    """Longer than ctx_len and than the cap: it keeps its end with the cue, the context grows, both are said."""
    path = write_csv(tmp_path / "p.csv", [["long " * 100, "gladly", "no"]])
    steps, said = trained(path, "--rlhf_max_corpus_len", 80)
    assert "prompt cut in 1 row" in said and "ctx_len grows from 64 to" in said
    assert steps[0]["tokens"] == 79 + len(" gladly\n\n") + len(" no\n\n")
    assert letters.decode(open_pairs(path, letters, max_len=80)[0].prompt).endswith("long\n\nAssistant:")


def test_duplicate_and_opposite_rows_are_counted(trained, tmp_path):
    """They are trained on, as they stand, and said."""
    opposite = [ROWS[1][0], ROWS[1][2], ROWS[1][1]]
    _, said = trained(write_csv(tmp_path / "p.csv", [*ROWS, ROWS[0], ROWS[0], opposite]))
    assert "5 rows, 5 pairs" in said
    assert "2 rows repeat another one" in said and "1 row says the opposite of another one" in said


def test_mixed_languages_reach_the_model_whole(trained, tmp_path, letters):
    """Bytes of every script, of emoji made of several code points, and of text from right to left."""
    texts = [
        "\u732b\u306f\u597d\u304d?",
        "\u0414\u0430, \u043e\u0447\u0435\u043d\u044c \U0001f468\u200d\U0001f469",
        "\u05dc\u05d0 \u0644\u0627 \u0e44\u0e21\u0e48",
    ]
    path = write_csv(tmp_path / "p.csv", [texts])
    pair = open_pairs(path, letters)[0]
    found = [letters.decode_bytes(part).decode() for part in (pair.prompt, pair.chosen, pair.reject)]
    assert found == [f"User: {texts[0]}\n\nAssistant:", f" {texts[1]}\n\n", f" {texts[2]}\n\n"]
    trained(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_nul_bytes_are_refused_by_line(script, typed, trained, tmp_path, suffix):
    """They come from files of another encoding; a model trained on them learns to say them."""
    path = tmp_path / f"p.{suffix}"
    rows = [*ROWS, ["say\0c", "gladly", "no"]]
    if suffix == "csv":
        write_csv(path, rows)
    else:
        path.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "reject"), row))) + "\n" for row in rows))
    status, _, err = script(train.main, *typed, path)
    assert status == 2 and f"{path}:{4 if suffix == 'csv' else 3}" in err and "NUL" in err
    _, said = trained(path, "--skip_bad", 1)
    assert "skipped 1: NUL byte" in said


def test_crlf_bom_quotes_and_line_breaks_change_nothing(tmp_path, letters):
    """The same pairs from a file as a spreadsheet writes it and as a program does."""
    rows = [['say "a", please', "gladly:\none, two", 'no "thanks"\n\n\nreally'], ["b", "x,y", "'"]]
    plain = write_csv(tmp_path / "plain.csv", rows)
    texts = plain.read_bytes().decode().replace("\r\n", "\n")
    other = tmp_path / "other.csv"
    other.write_bytes(b"\xef\xbb\xbf" + texts.replace("\n", "\r\n").encode())
    lines = "".join(json.dumps(dict(zip(("prompt", "chosen", "reject"), row))) + "\r\n" for row in rows)
    (tmp_path / "other.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = [list(open_pairs(tmp_path / name, letters)) for name in ("plain.csv", "other.csv", "other.jsonl")]
    assert found[0] == found[1] == found[2] and len(found[0]) == 2
    assert letters.decode(found[0][0].prompt) == 'User: say "a", please\n\nAssistant:'
    assert letters.decode(found[0][0].reject) == ' no "thanks"\nreally\n\n'


def test_fields_of_100000_characters(trained, tmp_path):
    """Longer than the csv module's own limit: read, cut at the cap, counted."""
    path = write_csv(tmp_path / "p.csv", [*ROWS, ["p" * 100_000, "y" * 100_000, "n" * 200_000]])
    steps, said = trained(path, "--micro_bsz", 3)
    assert all(f"{part} cut in 1 row" in said for part in ("prompt", "chosen", "reject"))
    assert steps[0]["tokens"] > 3000


def test_scores_of_a_packed_reference_are_used(script, trained, base_model, vocab_file, tmp_path):
    """rlhf_dpo_generate_save.py in the precision and storage of training: the work is not done twice."""
    path, saved = write_csv(tmp_path / "p.csv", ROWS), tmp_path / "p.save"
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--input_csv", path, "--output_save", saved]
    words += ["--target_pair_count", 2, "--strategy", "cpu bf16", "--quant_mode", "nf4"]
    assert script(score_pairs.main, *words)[0] == 0
    steps, said = trained(saved, "--precision", "bf16", "--quant", 1, "--peft", "lora", "--lora_r", 4)
    assert "reference scores of 2 pairs: from" in said and abs(steps[-1]["reward_margin"]) < 0.02
    _, said = trained(saved, "--precision", "bf16", "--peft", "lora", "--lora_r", 4, "--force", 1)
    assert said.count("computing them again") == 1  # --quant 0


def test_references_of_another_model_are_computed_anew(trained, typed, base_model, tmp_path):
    """A cache or a .save of another model: said once, never used, and the first margin is 0 again."""
    path = write_csv(tmp_path / "p.csv", ROWS)
    trained(path)
    tensors = torch.load(base_model, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save(tensors | {"head.weight": tensors["head.weight"] * 1.5}, other)
    steps, said = trained(path, "--load_model", other, "--force", 1)
    assert said.count("2 pairs: computing") == 1 and abs(steps[-1]["reward_margin"]) < 1e-6
    _, said = trained(path, "--force", 1)
    (kept,) = [file for file in (tmp_path / "out" / "cache").iterdir() if str(file) in said]
    kept.write_bytes(kept.read_bytes()[:200])
    steps, said = trained(path)
    assert said.count("damaged") == 1 and abs(steps[-1]["reward_margin"]) < 1e-6
    saved = tmp_path / "p.save"
    write_save(saved, [PairExample([9, 8], [7, 6], [5], (-1.0, -2.0))], {"model": "0" * 64, "reference": "sum"})
    assert read_save(saved, DataReport(str(saved)))[0].reference == (-1.0, -2.0)
    steps, said = trained(saved, "--force", 1)
    assert said.count("computing them again") == 1 and abs(steps[-1]["reward_margin"]) < 1e-6


def conversation(answer):
    return [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("template", ["world", "jinja"])
def test_multi_turn_pairs_train_the_last_answer(trained, tmp_path, letters, template):
    """The whole conversation is the prompt, in the template's words; earlier answers carry no loss."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"chosen": conversation("gladly"), "rejected": conversation("no")}) + "\n")
    (tmp_path / "chat.jinja").write_text(JINJA)
    name = str(tmp_path / "chat.jinja") if template == "jinja" else template
    pair = open_pairs(path, letters, template=name)[0]
    texts = [letters.decode(part) for part in (pair.prompt, pair.chosen, pair.reject)]
    if template == "world":
        assert texts[0] == "System: be kind\n\nUser: one\n\nAssistant: first\n\nUser: two\n\nAssistant:"
        assert texts[1:] == [" gladly\n\n", " no\n\n"]
    else:
        turns = "<|system|>be kind<|end|>\n<|user|>one<|end|>\n<|assistant|>first<|end|>\n<|user|>two<|end|>\n"
        assert texts == [f"{turns}<|assistant|>", "gladly<|end|>\n", "no<|end|>\n"]
    steps, _ = trained(path, "--template", name)
    assert steps[0]["tokens"] == len(pair.prompt) - 1 + len(pair.chosen) + len(pair.reject)


def test_chats_under_a_chat_template_train_the_assistant_only(tmp_path, letters):
    """Supervised fine-tuning on a chat: all answers with their marks are trained, nothing else is, nothing is lost."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [*conversation("fine"), {"role": "user", "content": "unanswered"}]}) + "\n")
    (tmp_path / "chat.jinja").write_text(JINJA)
    example = open_text(path, letters, template=str(tmp_path / "chat.jinja"))[0]
    whole = letters.decode(example.tokens.tolist())
    assert whole.endswith("<|assistant|>fine<|end|>\n") and whole.startswith("<|system|>be kind<|end|>\n<|user|>one")
    trained_ids = example.tokens[example.mask].tolist()
    assert letters.decode(trained_ids) == "first<|end|>\nfine<|end|>\n"
