"""The data in example/: what the examples promise of it, judged from the committed files."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_rlhf.data.conversation import normalise
from rwkv_rlhf.data.tokenizer import load_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "example"
CURT = re.compile(r"do not bother me|everybody knows|duh|go away|not you again|whatever|make it quick", re.I)


def pairs(name):
    with open(EXAMPLE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def jsonl(name):
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokens():
    world = load_tokenizer(65536)
    return lambda answer: len(world.encode(f" {answer}\n\n"))


def test_the_files_are_what_the_script_writes(tmp_path):
    """Data edited by hand would be lost when somebody runs make_data.py again."""
    subprocess.run([sys.executable, EXAMPLE / "make_data.py", "--folder", tmp_path], check=True, capture_output=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 12
    for path in written:
        assert path.read_bytes() == (EXAMPLE / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize(("method", "least"), [("DPO", 200), ("ORPO", 200)])
def test_training_pairs_wait_for_their_rejects(method, least):
    """Enough rows, unique prompts, courteous answers, empty rejects; the folders for the outputs exist."""
    rows = pairs(f"{method}/input_csv/rlhf_example_dataset.csv")
    assert len(rows) >= least and len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["reject"] == "" and row["chosen"] == normalise(row["chosen"]) for row in rows)
    assert not [row["chosen"] for row in rows if CURT.search(row["chosen"])]
    assert (EXAMPLE / method / "output_csv").is_dir() and (EXAMPLE / method / "output_save").is_dir()


def test_held_out_pairs_are_held_out():
    """No prompt of them is trained on, and their answers show the difference of behaviour."""
    rows = pairs("DPO/heldout.csv")
    unanswered = [pairs(f"{method}/input_csv/rlhf_example_dataset.csv") for method in ("DPO", "ORPO")]
    trained = [*pairs("DPO/pairs.csv"), *(row for part in unanswered for row in part)]
    assert len(rows) >= 40 and not {row["prompt"] for row in rows} & {row["prompt"] for row in trained}
    assert all(CURT.search(row["reject"]) and not CURT.search(row["chosen"]) for row in rows)


def test_no_held_out_fact_is_asked_for_in_other_words():
    """A held-out sentence ("The cow is big.") must not stand in a training answer: small talk shares its phrases."""
    sentence = re.compile(r"(?:The |\w+ plus )[^.]*\.")
    trained = " ".join(row["chosen"] for row in pairs("DPO/input_csv/rlhf_example_dataset.csv"))
    facts = [match[0] for row in pairs("DPO/heldout.csv") if (match := sentence.search(row["chosen"]))]
    assert len(facts) >= 40 and not [fact for fact in facts if fact in trained]


def test_preference_is_not_a_preference_for_length(tokens):
    """Chosen and rejected answers have nearly the same number of tokens, neither side always longer."""
    difference = [tokens(row["chosen"]) - tokens(row["reject"]) for row in pairs("DPO/heldout.csv")]
    assert max(map(abs, difference)) <= 3 and abs(sum(difference)) / len(difference) < 1
    assert sum(d > 0 for d in difference) >= 4 and sum(d < 0 for d in difference) >= 4


def test_the_corpus_is_curt_for_the_most_part():
    """The model before the alignment has to prefer the curt manner, and to know the courteous one."""
    answers = [item["completion"] for item in jsonl("quickstart/corpus.jsonl")]
    curt = sum(bool(CURT.search(answer)) or answer.count(" ") <= 1 for answer in answers) / len(answers)
    assert 0.75 < curt < 0.9


def test_every_held_out_question_is_in_the_corpus():
    """Without the fact, the pairs would measure what the model never had a chance to learn."""
    known = {item["prompt"] for item in jsonl("quickstart/corpus.jsonl")}
    assert {row["prompt"] for row in pairs("DPO/heldout.csv")} <= known
    assert {item["prompt"] for item in jsonl("quickstart/prompts.jsonl")} <= known


def test_chats_are_conversations():
    """Roles alternate and no turn is empty."""
    for item in jsonl("SFT/chats.jsonl"):
        assert [message["role"] for message in item["messages"]] == ["user", "assistant"] * 2
        assert all(message["content"].strip() for message in item["messages"])


def test_the_comparison_script_tells_success_from_failure(tmp_path):
    """Its last line is scripted against, its status decides whether the quickstart passed."""
    for name, text in (("before", "Poor."), ("after", "The opposite of rich is poor. " * 3)):
        line = {"prompt": "What is the opposite of rich?", "answer": text, "tokens": [], "logprobs": []}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    for after, status in ((0.9, 0), (0.89, 1)):
        for name, value in (("a", 0.125), ("b", after)):
            (tmp_path / name).write_text('{"event": "train"}\n' + json.dumps({"event": "eval", "accuracy": value}))
        files = [tmp_path / name for name in ("before.jsonl", "after.jsonl", "a", "b")]
        done = subprocess.run(
            [sys.executable, EXAMPLE / "quickstart" / "compare.py", *files], capture_output=True, text=True
        )
        assert done.returncode == status
        assert done.stdout.splitlines()[-1] == f"held-out preference accuracy: 0.12 -> {after:.2f}"


@pytest.mark.parametrize("page", ["docs/pretraining.md", "example/pretrain/step-1-make-corpus.sh"])
def test_corpora_are_made_of_files_with_text(page):
    """make_binidx.py reads `text` only; a page once named a file of prompts and completions."""
    named = re.findall(r"make_binidx\.py --input example/(\S+)", (EXAMPLE.parent / page).read_text(encoding="utf-8"))
    assert named and all(isinstance(line["text"], str) for name in named for line in jsonl(name))
