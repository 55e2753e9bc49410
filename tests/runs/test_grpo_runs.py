"""Whole runs of --grpo 1: the shipped example, held-out prompts, and what stops a run."""

import json
import shlex

import pytest
import torch

from rwkv_rlhf.commands import train
from tests.support.files import jsonl, read_jsonl
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow

REWARDS = f"{ROOT}/tests/support/rewards.py"
EXAMPLE = ROOT / "example" / "GRPO"


@pytest.fixture
def words(base_model, vocab_file, pairs_csv, tmp_path):
    """A small run, without its rewards."""
    return [
        *("--grpo", 1, "--load_model", base_model, "--vocab_file", vocab_file, "--rlhf_train_file", pairs_csv),
        *("--proj_dir", tmp_path / "out", "--grpo_gen_count", 2, "--grpo_gen_length", 4, "--micro_bsz", 2),
        *("--epoch_steps", 2, "--epoch_count", 1, "--peft", "lora", "--quant", 0, "--random_seed", 1),
    ]


def commands_of(script, **changes):
    """The words behind `python train.py` of each command in a script of the example; `changes` replace some values."""
    text = (EXAMPLE / script).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip().startswith("python train.py "):
            found = shlex.split(line.strip())[2:]
            for flag, value in changes.items():
                if f"--{flag}" in found:
                    found[found.index(f"--{flag}") + 1] = str(value)
            yield [word.replace("example/GRPO", str(EXAMPLE)) for word in found]


def test_the_example_learns_to_answer_rightly(script, tmp_path):
    """The shipped commands with fewer steps: right answers become more, also to sums that were never practised.

    With all steps they triple (example/GRPO/README.md).
    """
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    init, sft = commands_of("step-1-pretrain.sh", proj_dir=base, load_model=base / "rwkv-init.pth", epoch_steps=400)
    init[init.index("--load_model") + 1] = "0"
    shorter = {"load_model": base / "rwkv-final.pth", "epoch_steps": 30, "epoch_count": 1}
    (grpo,) = commands_of("step-2-train-grpo.sh", proj_dir=tuned, **shorter)
    (compare,) = commands_of("step-3-compare.sh", proj_dir=tmp_path / "eval", load_model=base / "rwkv-final.pth")
    for one in (init, sft, compare, grpo):
        status, _, err = script(train.main, *one)
        assert status == 0, err
    (before,) = read_jsonl(tmp_path / "eval" / "metrics.jsonl", "eval")
    (after,) = read_jsonl(tuned / "metrics.jsonl", "val")
    assert before["prompts"] == after["prompts"] == 60
    assert after["rewards/exact"] >= 1.3 * before["rewards/exact"] > 0.1
    steps = read_jsonl(tuned / "metrics.jsonl", "train")
    assert steps[0]["sampler_gap"] <= 1e-5 and all(step["clip_fraction"] == 0 for step in steps)
    right = [step["rewards/exact"] for step in steps]
    assert sum(right[-5:]) > 1.3 * sum(right[:5])
    shown = read_jsonl(tuned / "samples.jsonl")
    assert {line["rollout"] for line in shown} == {1, 11, 21} and len(shown) == 3 * 4 * 8
    assert {"prompt", "answer", "reward", "rewards", "advantage", "finished"} <= set(shown[0])


def test_the_example_in_rwkv_6(script, tmp_path):
    """If this breaks, the README's "RWKV-6: --my_testing x060 and nothing else" is not so: sampler and trainer
    disagree, or the numbers of a step are not there. In a few steps nothing is learnt; that is the test above."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    few = {
        "proj_dir": base,
        "load_model": base / "rwkv-init.pth",
        "epoch_steps": 30,
        "micro_bsz": 32,
        "my_testing": "x060",
    }
    init, sft = commands_of("step-1-pretrain.sh", **few)
    init[init.index("--load_model") + 1] = "0"
    few = {"proj_dir": tuned, "load_model": base / "rwkv-final.pth", "epoch_steps": 3, "epoch_count": 1}
    (grpo,) = commands_of("step-2-train-grpo.sh", **few)
    for one in (init, sft, grpo):
        status, _, err = script(train.main, *one)
        assert status == 0, err
    steps = read_jsonl(tuned / "metrics.jsonl", "train")
    assert len(steps) == 3 and steps[0]["sampler_gap"] <= 1e-5
    assert {"rewards/exact", "rewards/number", "kl", "entropy", "truncated", "completion_length"} <= set(steps[0])
    (after,) = read_jsonl(tuned / "metrics.jsonl", "val")
    assert after["prompts"] == 60 and 0 < after["reward"] < 1.2


def test_a_broken_reward_stops_the_run_and_loses_nothing(script, words, tmp_path, monkeypatch):
    """One sentence with the function, the error and the sample, status 2; rwkv-last and a point hold what was learnt,
    and the mended run goes on to the same end."""
    text = "\n".join(
        ["def mean(prompts, completion_ids, **columns):", "    {}", "    return [sum(i) for i in completion_ids]"]
    )
    file = tmp_path / "mine.py"
    file.write_text(text.format("if 'say 7' in ' '.join(prompts): raise KeyError('answer')"))
    words = [*words, "--random_mode", 0, "--epoch_steps", 5, "--reward_funcs", f"{file}:mean", "--resume", "auto"]
    status, _, err = script(train.main, *words)
    assert status == 2 and err.count("\n") == 1, err
    assert "mean raised KeyError: 'answer' at the answer" in err and "pairs.csv:9 (row 8)" in err
    assert (tmp_path / "out" / "rwkv-last.pth").exists()
    assert [record["step"] for record in read_jsonl(tmp_path / "out" / "metrics.jsonl", "train")] == [1, 2, 3]
    file.write_text(text.format("pass"))
    assert script(train.main, *words)[0] == 0
    assert script(train.main, *words, "--proj_dir", tmp_path / "whole", "--resume", "")[0] == 0
    one, two = (torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True) for name in ("out", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--reward_funcs", "none.py:exact"), "--reward_funcs none.py:exact: there is no file none.py"),
        (("--reward_funcs", f"{REWARDS}:odd", "--grpo_gen_topp", 0.7), "--grpo_gen_topp 0.7: answers of a cut"),
        (
            ("--reward_funcs", f"{REWARDS}:odd", "--strategy", "fsdp"),
            "--strategy fsdp gathers the weights",
        ),
        ((), "--grpo 1 needs --reward_model or --reward_funcs"),
        (
            ("--reward_funcs", f"{REWARDS}:odd", "--grpo_advantage", "rloo", "--grpo_scale", "batch"),
            "--grpo_scale batch has no effect with --grpo_advantage rloo",
        ),
    ],
)
def test_what_cannot_be_is_refused(script, words, more, said, tmp_path):
    """One sentence with the flag, before anything is trained."""
    status, _, err = script(train.main, *words, *more)
    assert status == 2 and said in err and err.count("\n") == 1
    assert not list((tmp_path / "out").glob("rwkv-*"))


def test_prompts_of_a_conversation_are_split_and_looked_at(script, words, tmp_path):
    """--dry_run 1 shows the prompts; --val_split holds some out; --eval_only 1 rewards a file without training."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = ({"messages": [*turns, {"role": "user", "content": f"say {n}"}], "chosen": str(n)} for n in range(12))
    path = jsonl(tmp_path / "asked.jsonl", *rows)
    words = [*words, "--rlhf_train_file", path, "--reward_funcs", f"{REWARDS}:odd,short", "--reward_weights", "1,0.1"]
    status, out, err = script(train.main, *words, "--dry_run", 1)
    assert status == 0 and "Assistant: Yes?" in out and "optimizer steps" in out, err
    status, _, err = script(train.main, *words, "--val_split", 0.25, "--infctx", 1, "--chunk_ctx", 3)
    assert status == 0, err
    (held_out,) = read_jsonl(tmp_path / "out" / "metrics.jsonl", "val")
    assert held_out["prompts"] == 3 and held_out["rewards/odd"] > 0 and (tmp_path / "out" / "rwkv-best.pth").exists()
    status, out, err = script(
        train.main, *words, "--eval_only", 1, "--json", 1, "--val_file", path, "--proj_dir", tmp_path / "eval"
    )
    assert status == 0 and json.loads(out)["prompts"] == 12, err
