"""What a run shows of itself: answers to fixed prompts, the page, the first and the last lines on the screen."""

import logging

import pytest
import torch

from rwkv_rlhf.commands import merge, train
from rwkv_rlhf.training.module import TrainingModule
from tests.support.files import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture
def words(base_model, vocab_file, pairs_csv):
    """DPO with dropout, so that a number drawn by somebody else shows."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--dpo", 1, "--rlhf_train_file", pairs_csv),
        *("--precision", "fp32", "--peft", "lora", "--lora_dropout", 0.2, "--dropout", 0.1, "--micro_bsz", 4),
        *("--epoch_steps", 2, "--epoch_count", 2, "--epoch_save", 1, "--lr_init", "1e-3", "--random_seed", 3),
    ]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "say 1"}\n{"prompt": "and 2"}\n')
    return path


def weights(folder):
    return torch.load(folder / "rwkv-final.pth", weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def samples(folder):
    lines = read_jsonl(folder / "samples.jsonl")
    return [(line["step"], line["prompt"], line["answer"]) for line in lines]


def test_answers_change_no_bit_and_are_the_same_after_a_stop(script, words, prompts, tmp_path, monkeypatch):
    """If this breaks, looking at a run changes what it learns, or a resumed run has answers twice or none."""
    plain, asked, stopped = (tmp_path / name for name in ("plain", "asked", "stopped"))
    assert script(train.main, *words, "--proj_dir", plain)[0] == 0
    assert not (plain / "samples.jsonl").exists()  # nothing is held out and no prompt was given
    words = [*words, "--sample_prompts", prompts]
    assert script(train.main, *words, "--proj_dir", asked)[0] == 0
    assert same(weights(plain), weights(asked))
    found = samples(asked)
    assert [(step, prompt[-17:]) for step, prompt, _ in found] == [
        (step, f"{text}\n\nAssistant:") for step in (0, 2, 4) for text in ("say 1", "and 2")
    ]

    step, left = TrainingModule.training_step, [3]

    def killed(self, batch, index):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return step(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", killed)
    assert script(train.main, *words, "--proj_dir", stopped, "--resume", "auto")[0] == 1
    monkeypatch.setattr(TrainingModule, "training_step", step)
    assert script(train.main, *words, "--proj_dir", stopped, "--resume", "auto")[0] == 0
    assert samples(stopped) == found and same(weights(stopped), weights(asked))
    assert "the run went on from here after a stop" in (stopped / "report.html").read_text()


def test_a_run_from_its_first_line_to_its_last(script, words, tmp_path, caplog):
    """If this breaks, one sees neither what a run will do nor what became of it, or pastes a command that fails."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "out"
    status, _, err = script(train.main, *words, "--proj_dir", folder, "--val_split", 0.25)
    assert status == 0, err
    said = [record.getMessage() for record in caplog.records]
    for first in (
        "model: ",
        "method: dpo with lora of rank 8, fp32",
        "learning rate: 0.001 -> 1e-05",
        "memory: about ",
    ):
        assert any(line.startswith(first) for line in said), first
    assert "(before training)" in next(line for line in said if line.startswith("held out: accuracy"))
    assert sum(line.startswith("held out: accuracy 0.50 -> ") for line in said) == 2
    begin, end = (next(n for n, line in enumerate(said) if line.startswith(word)) for word in ("step 1/4", "step 4/4"))
    assert begin < end < next(n for n, line in enumerate(said) if line.startswith("done: 4 steps, "))
    best = next(line for line in said if "rwkv-best.pth (held-out accuracy " in line)
    assert best.startswith("saved ")
    (started,) = read_jsonl(folder / "metrics.jsonl", "start")
    assert started["step"] == 0 and started["accuracy"] == 0.5 and len(read_jsonl(folder / "metrics.jsonl", "val")) == 2
    merging, chatting = (line.strip() for line in said[said.index("next:") + 1 :][:2])
    status, out, err = script(merge.main, *merging.split()[2:])
    assert status == 0, err
    assert f"-> {folder / 'merged.pth'} (" in out and f"next: {chatting}" in out
    assert chatting == f"python chat.py --load_model {folder / 'merged.pth'}"
    page = (folder / "report.html").read_text()
    for text in ("ended: step 4 of 4", "Answers to fixed prompts", "Pairs still wrong", merging, "weight decay"):
        assert text in page, text
    assert len(samples(folder)) == 9  # three prompts of the data, before training and after both mini-epochs


@pytest.mark.parametrize("extra", [("--rm", 1), ("--dpo", 1)])
def test_prompts_that_cannot_be(script, words, prompts, tmp_path, extra):
    """If this breaks, a reward model is asked to write, or a damaged file of prompts is found after an hour."""
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"prompt": ')
    words = [word for at, word in enumerate(words) if word != "--dpo" and words[at - 1] != "--dpo"]
    path = prompts if extra[0] == "--rm" else damaged
    status, _, err = script(train.main, *words, *extra, "--proj_dir", tmp_path / "out", "--sample_prompts", path)
    said = "a reward model writes no answers" if extra[0] == "--rm" else "damaged.jsonl"
    assert status == 2 and said in err, err
    assert not (tmp_path / "out" / "rwkv-final.pth").exists()
