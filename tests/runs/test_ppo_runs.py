"""PPO on a two-layer model, as a user types it: rewards from functions and models, what is saved, what is refused."""

import json

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import chat, generate_rejects, merge, train
from rwkv_rlhf.scoring.reward_model import open_reward_model
from tests.support.files import VOCAB, read_jsonl
from tests.support.models import any_initial_tensors, random_tensors
from tests.support.source_files import ROOT
from tests.support.written_commands import written_in

pytestmark = pytest.mark.slow


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares; float32, so that equalities are tight."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--quant", 0),
        *("--ctx_len", 128, "--random_seed", 3, "--grad_cp", 0),
    ]


@pytest.fixture
def ran(script, typed):
    """ran(folder, words): train.py, which must succeed, and its records."""

    def call(folder, *words):
        status, _, err = script(train.main, *typed, "--proj_dir", folder, *words)
        assert status == 0, err
        return read_jsonl(folder / "metrics.jsonl", "train")

    return call


def test_ppo_finds_what_is_rewarded(ran, base_model, pairs_csv, tmp_path):
    """Answers of small bytes are rewarded: rewards rise, the weight of the KL penalty adapts.

    The value head is in the checkpoint, and not in the merged model.
    """
    rewards, out = tmp_path / "rewards.py", tmp_path / "out"
    rewards.write_text(
        "def small(completion_ids, **_):\n    return [sum(t < 128 for t in x) for x in completion_ids]\n"
    )
    records = ran(
        out,
        *("--ppo", 1, "--rlhf_train_file", pairs_csv, "--reward_funcs", f"{rewards}:small", "--init_kl_coef", 0.01),
        *("--batch_size", 64, "--mini_batch_size", 32, "--steps", 768, "--ppo_epochs", 2, "--output_max_length", 6),
        *("--lr_init", "3e-3", "--lr_final", "3e-3", "--save_freq", 6),
    )
    assert len(records) == 12 * 2 * 2 and records[0]["sampler_gap"] < 1e-5
    assert records[-1]["reward"] > records[0]["reward"] + 0.9
    assert records[0]["kl_coef"] == 0.01 and records[4]["kl_coef"] == pytest.approx(0.01 * (1 - 0.2 * 64 / 10000))
    assert records[0]["update_kl"] == pytest.approx(0, abs=1e-5) and records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert {"value_loss", "clip_fraction", "entropy", "completion_length", "truncated", "reward_std"} <= set(records[0])
    assert {"rewards/small", "explained_variance", "sampled_tokens_per_s", "mixed_groups"} <= set(records[0])
    assert all(record["trained_tokens_per_s"] >= record["tokens_per_s"] for record in records)
    assert [path.name for path in sorted(out.glob("rwkv-?.pth"))] == ["rwkv-0.pth", "rwkv-1.pth"]
    saved = read_tensors(out / "rwkv-final.pth")
    assert bool(saved["value_head.weight"].abs().sum() > 0)
    words = ["--base_model", base_model, "--lora_checkpoint", out / "rwkv-final.pth"]
    assert merge.main([*map(str, words), "--output", str(tmp_path / "merged.pth")]) == 0
    assert read_tensors(tmp_path / "merged.pth").keys() == read_tensors(base_model).keys()


def test_a_reward_model_judges(ran, script, typed, base_model, pairs_csv, tmp_path):
    """From the folder of its run, over its base: the logged reward is what that model says of the sampled answers. What
    is no reward model of this vocabulary is refused in a sentence."""
    learnt = ["--peft", "lora", "--lr_init", "3e-3", "--lr_final", "1e-3"]
    short = ["--epoch_steps", 4, "--epoch_count", 1, "--micro_bsz", 8]
    ran(tmp_path / "rm", "--rm", 1, "--rlhf_train_file", pairs_csv, *learnt, *short)
    ppo = ["--ppo", 1, "--rlhf_train_file", pairs_csv, *learnt, "--batch_size", 4, "--mini_batch_size", 4, "--steps", 4]
    ppo += ["--output_max_length", 6, "--ppo_epochs", 1, "--samples_every", 1]
    (record,) = ran(tmp_path / "out", *ppo, "--reward_model", tmp_path / "rm")
    judge = open_reward_model(tmp_path / "rm" / "rwkv-final.pth", BuildOptions(torch.float32), VOCAB)
    assert record["rewards/reward_model"] == record["reward"] and judge.model.scalar_head("score_head") is not None
    torch.save(random_tensors(n_layer=1, vocab_size=VOCAB + 3, heads="score_head"), tmp_path / "other.pth")
    wrong = {
        base_model: "no reward model",
        tmp_path / "nothing.pth": "does not exist",
        tmp_path / "other.pth": f"vocabulary of {VOCAB + 3}",
    }
    for model, said in wrong.items():
        status, _, err = script(train.main, *typed, *ppo, "--proj_dir", tmp_path / "bad", "--reward_model", model)
        assert status == 2 and said in err.splitlines()[-1], err
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB}"):
        open_reward_model(tmp_path / "rm", BuildOptions(torch.float32), VOCAB + 1)
    about = tmp_path / "rm" / "rwkv-final.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="not there any more"):
        open_reward_model(tmp_path / "rm", BuildOptions(torch.float32), VOCAB)


SHORT = {
    "--max_tokens": 6,
    "--epoch_steps": 3,
    "--steps": 32,
    "--batch_size": 16,
    "--mini_batch_size": 8,
    "--save_freq": 1,
}
SHORT |= {"--output_max_length": 5, "--input_csv": "few.csv", "--val_file": "held.csv"}
NAMES = {"train": train, "merge": merge, "chat": chat, "rlhf_generate_reject_csv": generate_rejects}


def test_the_example_in_rwkv_6(script, tmp_path, monkeypatch):
    """The shipped commands of example/PPO on a model that knows nothing, with few steps: each stage takes what the one
    before has written, and what the README points at is there. What is learnt is in that README."""
    base = any_initial_tensors("x060", 2, 64, 65536, 32, 7)  # at first each token is by itself: then nothing is learnt
    torch.save({name: value + 0.02 * torch.randn(value.shape) for name, value in base.items()}, tmp_path / "base.pth")
    for name, source in {"few.csv": "input_csv/rlhf_example_dataset.csv", "held.csv": "heldout.csv"}.items():
        lines = (ROOT / "example" / "DPO" / source).read_text(encoding="utf-8").splitlines()
        (tmp_path / name).write_text("\n".join(lines[:17]) + "\n", encoding="utf-8")
    (tmp_path / "example").symlink_to(ROOT / "example")
    (tmp_path / "out" / "ppo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    steps = [one for path in sorted((ROOT / "example" / "PPO").glob("step-*.sh")) for one in written_in(path)]
    assert [one.name for one in steps] == ["rlhf_generate_reject_csv", "train", "train", "merge", "train", "chat"]
    again = [one._replace(words=[w.replace("eval-1", "eval-2") for w in one.words]) for one in steps[-2:]]
    for model, one in [*(("base.pth", one) for one in steps), *(("out/ppo/merged.pth", one) for one in again)]:
        short = SHORT | {"--load_model": model, "--base_model": "base.pth"}
        words = [short.get(before, word) for before, word in zip(["", *one.words], one.words)]
        status, _, err = script(NAMES[one.name].main, *words)
        assert status == 0, (one.place, err)
    records, held = (read_jsonl(tmp_path / "out/ppo/policy/metrics.jsonl", event) for event in ("train", "val"))
    assert len(records) == 2 * 2 * 2 and all(0 <= record["kl"] < 1 for record in records)
    assert records[0]["sampler_gap"] < 1e-5 and len(held) == 2 and held[-1]["prompts"] == 16
    rewards = [read_jsonl(tmp_path / f"out/ppo/eval-{n}/metrics.jsonl", "eval")[0]["reward"] for n in (1, 2)]
    assert rewards[0] != rewards[1]
    assert "answer" in read_jsonl(tmp_path / "out/ppo/1.jsonl")[0]
    shown = [line for line in read_jsonl(tmp_path / "out/ppo/policy/samples.jsonl") if line.get("rollout") == 1]
    page = (tmp_path / "out/ppo/policy/report.html").read_text()
    assert shown and f"{shown[0]['reward']:.4g}"[:5] in page
