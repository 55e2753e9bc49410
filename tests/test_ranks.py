"""Several processes train what one process would: the same losses, the same weights, one set of files."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train
from tests.conftest import read_jsonl

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = 3


def starter(*words, script="train.py", **variables):
    """A process of several, on one core each."""
    command = [sys.executable, script, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def shared_words(base, vocab_file):
    return [
        *("--load_model", base, "--vocab_file", vocab_file, "--accelerator", "cpu", "--precision", "fp32"),
        *("--quant", 0, "--ctx_len", 128, "--epoch_save", 1, "--random_seed", 3, "--epoch_count", 1),
        *("--lr_init", "1e-3", "--lr_final", "1e-3"),
    ]


def case(text, pairs, name):
    """The words of a case and, for one process and for two, those that make the same steps of it."""
    sft, dpo = ("--sft", 1, "--data_file", text), ("--dpo", 1, "--dpo_beta", 0.1, "--rlhf_train_file", pairs)
    lora = ("--peft", "lora", "--quant", 1, "--quant_mode", "nf4", "--lora_r", 4, "--lora_dropout", 0)
    words = {
        "sft": (*sft, "--val_file", text),
        "dpo": (*dpo, "--val_file", pairs),
        "kto": ("--kto", 1, "--rlhf_train_file", pairs, "--kto_beta", 0.1),
        "infctx": (*sft, "--infctx", 1, "--chunk_ctx", 7),  # documents of 13 to 34 tokens: 2 to 5 pieces
        "lora": (*dpo, *lora, "--infctx", 1, "--chunk_ctx", 9),
        "empty": ("--sft", 1, "--data_file", text.parent / "empty.jsonl", "--random_mode", 0),
    }[name]
    size, parts = (1, 2) if name == "infctx" else (4, 1) if name == "kto" else (2, 2)
    shape = ("--micro_bsz", size)

    def of(processes):
        pieces = 2 * parts // processes
        return [*words, *shape, "--accumulate_grad_batches", pieces, "--epoch_steps", STEPS * pieces]

    return of


CASES = ("sft", "dpo", "kto", "infctx", "lora", "empty")


@pytest.fixture(scope="module")
def runs(base_model, vocab_file, text_jsonl, pairs_csv, tmp_path_factory):
    """(folders of one process, folders of two) by case."""
    folder = tmp_path_factory.mktemp("ranks")
    (text_jsonl.parent / "empty.jsonl").write_text(
        "\n".join(json.dumps({"text": "" if n % 4 in (2, 3) else f"line {n}"}) for n in range(24)) + "\n"
    )
    lists = []
    words = {name: case(text_jsonl, pairs_csv, name) for name in CASES}
    for name in CASES:
        lists.append([*shared_words(base_model, vocab_file), *words[name](2), "--proj_dir", folder / "two" / name])
    path = folder / "runs.json"
    path.write_text(json.dumps([[str(word) for word in one] for one in lists]))
    process = starter(path, "--devices", 2, script="tests/several_runs.py")
    for name in CASES:
        one = [*shared_words(base_model, vocab_file), *words[name](1), "--proj_dir", folder / "one" / name]
        train.main([str(word) for word in one])
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return folder / "one", folder / "two"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_same_batch(runs, name):
    """If this breaks, a run on two devices learns something else than the same run on one."""
    one, two = (folder / name for folder in runs)
    assert not list(two.glob("error*")), [path.read_text() for path in two.glob("error*")]
    for event in ("train", "val"):
        first, second = (read_jsonl(folder / "metrics.jsonl", event) for folder in (one, two))
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert a.keys() == b.keys()
            for key in a.keys() - {"tokens_per_s", "event"}:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (key, a, b)
    a, b = (torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in (one, two))
    assert a.keys() == b.keys()
    for key, value in a.items():  # Adam's first steps are signs: compare where the gradient is not noise
        assert (value - b[key]).abs().mean() < 2e-5, key
    logs = [(folder / "train_log.txt").read_text() for folder in (one, two)]
    assert [text.count("NEW RUN") for text in logs] == [1, 1]
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
