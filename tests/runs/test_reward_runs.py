"""A reward model from preference data to scores of answers: trained, saved, merged, evaluated, used."""

import csv
import json

import pytest
import torch

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import merge, score, train
from tests.support.files import read_jsonl
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares; float32, so that equalities are tight."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--quant", 0),
        *("--ctx_len", 128, "--random_seed", 3, "--grad_cp", 0, "--epoch_count", 1, "--micro_bsz", 8),
    ]


@pytest.fixture
def did(script):
    """did(main, words) runs a command, which must succeed."""

    def call(main, *words):
        status, _, err = script(main, *words)
        assert status == 0, err

    return call


def rows_of(path):
    """The rows of a CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def answers(pairs_csv, tmp_path):
    """A file of a chosen and a rejected answer, and the chosen one again as messages; and its objects."""
    first = rows_of(pairs_csv)[0]
    talk = [{"role": "user", "content": first["prompt"]}, {"role": "assistant", "content": first["chosen"]}]
    lines = [
        {"prompt": first["prompt"], "answer": first["chosen"], "id": 7},
        {"prompt": first["prompt"], "completion": first["reject"]},
        {"messages": talk},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, lines


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_from_pairs_to_rewards(did, typed, base_model, vocab_file, pairs_csv, answers, tmp_path, peft):
    """It learns the preference; the merged model, the checkpoint over its base, --eval_only and score.py agree."""
    out, merged = tmp_path / "out", tmp_path / "reward.pth"
    data = ["--rlhf_train_file", pairs_csv, "--val_file", pairs_csv]
    how = ["--peft", peft, "--epoch_steps", 16, "--lr_init", "3e-3", "--lr_final", "1e-3"]
    did(train.main, *typed, "--proj_dir", out, "--rm", 1, *data, *how)
    steps, (held,) = read_jsonl(out / "metrics.jsonl", "train"), read_jsonl(out / "metrics.jsonl", "val")
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and steps[0]["accuracy"] == 0.5
    assert held["accuracy"] > 0.9 and held["reward_margin"] > 0.5 and held["loss"] < 0.5
    assert held["reward_min"] < held["reject_reward"] < held["reward"] < held["chosen_reward"] < held["reward_max"]
    checkpoint = out / "rwkv-final.pth"
    saved = read_tensors(checkpoint)
    assert saved["score_head.weight"].shape == (1, 64) and "head.weight" not in saved
    did(merge.main, "--base_model", base_model, "--lora_checkpoint", checkpoint, "--output", merged)
    assert torch.equal(read_tensors(merged)["score_head.weight"], saved["score_head.weight"])

    only = ["--vocab_file", vocab_file, "--precision", "fp32", "--eval_only", 1, "--val_file", pairs_csv]
    did(train.main, *only, "--load_model", merged, "--proj_dir", tmp_path / "one")
    did(train.main, *only, "--load_model", base_model, "--load_adapter", checkpoint, "--proj_dir", tmp_path / "two")
    for name in ("one", "two"):
        (figures,) = read_jsonl(tmp_path / name / "metrics.jsonl")
        for key in ("accuracy", "reward_margin", "reward_min", "reward_max", "loss"):
            assert figures[key] == pytest.approx(held[key], rel=1e-3, abs=1e-4), (name, key)

    path, lines = answers
    rewards = []
    for number, model in enumerate(([merged], [base_model, "--load_adapter", checkpoint])):
        scored = tmp_path / f"scored-{number}.jsonl"
        words = ["--load_model", *model, "--vocab_file", vocab_file, "--strategy", "cpu fp32"]
        did(score.main, *words, "--input", path, "--output", scored)
        found = read_jsonl(scored)
        assert [{key: value for key, value in one.items() if key != "reward"} for one in found] == lines
        rewards.append([one["reward"] for one in found])
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-4, abs=1e-4)
    good, bad, again = rewards[0]
    assert good > bad and good == pytest.approx(again)


def test_a_score_head_with_an_adapter_of_its_own(did, typed, base_model, vocab_file, pairs_csv, answers, tmp_path):
    """A row `score_head` in the layer profile: merge.py folds its factors into `score_head.weight`, also over a base
    that has none, and the two judge alike. (tests/runs/test_resume.py stops a run with such rows.)"""
    out, merged, scored = tmp_path / "out", tmp_path / "reward.pth", tmp_path / "scored.jsonl"
    words = ["--rm", 1, "--rlhf_train_file", pairs_csv, "--layer_profile", ROOT / "tests" / "support" / "head_rows.csv"]
    did(train.main, *typed, *words, "--epoch_steps", 4, "--proj_dir", out)
    saved = read_tensors(out / "rwkv-final.pth")
    a, b = saved["score_head.lora_A"], saved["score_head.lora_B"]
    assert bool(b.any()) and "score_head.weight" not in saved
    did(merge.main, "--base_model", base_model, "--lora_checkpoint", out / "rwkv-final.pth", "--output", merged)
    torch.testing.assert_close(read_tensors(merged)["score_head.weight"], 8 / 4 * b @ a)
    rewards = []
    for model in ([merged], [base_model, "--load_adapter", out / "rwkv-final.pth"]):
        words = ["--load_model", *model, "--vocab_file", vocab_file, "--strategy", "cpu fp32"]
        did(score.main, *words, "--input", answers[0], "--output", scored)
        rewards.append([one["reward"] for one in read_jsonl(scored)])
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-4, abs=1e-4) and len({round(r, 4) for r in rewards[0]}) == 2


def test_what_is_no_reward_model_is_refused(script, typed, base_model, vocab_file, pairs_csv, answers, tmp_path):
    """Numbers of a head that nobody trained, or margins that are not there, would be believed."""
    output = tmp_path / "rewards.jsonl"
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--input", answers[0], "--output", output]
    status, _, err = script(score.main, *words)
    assert status == 2 and "no score head" in err and "--rm 1" in err and not output.exists()
    folder = ["--proj_dir", tmp_path / "out", "--rm", 1]
    status, _, err = script(train.main, *typed, *folder, "--eval_only", 1, "--val_file", pairs_csv)
    assert status == 2 and "is no reward model" in err and "--load_adapter" in err
    status, _, err = script(train.main, *typed, *folder, "--rm_margin", 1, "--rlhf_train_file", pairs_csv)
    assert status == 2 and "--rm_margin 1" in err and "score_chosen" in err
