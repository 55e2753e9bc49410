"""The neural_chat pipeline by its own commands on a two-layer model: SFT, merging, a reward model, PPO."""

import json
import shlex
import sys

import pytest

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import chat, finetune_clm, merge_peft_adapter, reward_modeling, rl_training
from tests.support.files import jsonl, read_jsonl
from tests.support.processes import started

pytestmark = pytest.mark.slow

SFT = """--bf16 True --dataset_concatenation --per_device_train_batch_size 2 --per_device_eval_batch_size 2
 --gradient_accumulation_steps 4 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2 --save_total_limit 1
 --learning_rate 1e-4 --logging_steps 1 --do_train --num_train_epochs 3 --overwrite_output_dir --log_level info
 --peft lora --use_fast_tokenizer false --use_auth_token True"""
RM = "--log_level info --num_train_epochs 3 --logging_steps 1 --per_device_train_batch_size 4 --hf_access_token xxxxxx"
PPO = """--log_with=wandb --adafactor=False --save_freq=100 --output_max_length=8 --batch_size=8
 --gradient_accumulation_steps=8 --batched_gen=True --ppo_epochs=4 --seed=0 --learning_rate=1.4e-5 --early_stopping=True
 --hf_access_token xxxxxx --steps=8"""


@pytest.fixture
def orca(tmp_path):
    """8 rows as Intel/orca_dpo_pairs has them."""
    rows = (
        {"system": "" if n % 3 else "Be brief.", "question": f"say {n}", "chosen": f"{n}!", "rejected": f"no {n}"}
        for n in range(8)
    )
    return jsonl(tmp_path / "orca.jsonl", *rows)


@pytest.fixture
def did(script, tmp_path, monkeypatch):
    """did(command, line, words): run in tmp_path, where every path is a name; it must succeed."""
    monkeypatch.chdir(tmp_path)

    def call(command, line, *words):
        status, out, err = script(command.main, *shlex.split(line), *words)
        assert status == 0, err
        return out + err

    return call


def test_three_stages_as_they_are_typed(did, base_model, vocab_file, orca, tmp_path, caplog):
    """If this breaks, who knows the pipeline has to learn another one: each stage takes the folder of the one before,
    merged or not, and what it means besides is said."""
    data = ["--dataset_name", orca, "--tokenizer_name", vocab_file]
    caplog.set_level("INFO")
    did(finetune_clm, SFT, "--model_name_or_path", base_model, "--output_dir", "sft", *data)
    steps = read_jsonl(tmp_path / "sft" / "metrics.jsonl", "train")
    assert len(steps) == 3 and steps[0]["lr"] == 1e-4 and steps[-1]["lr"] < 5e-5
    assert [path.name for path in (tmp_path / "sft").glob("rwkv-?.pth")] == ["rwkv-1.pth"]
    assert json.loads((tmp_path / "sft" / "rwkv-final.json").read_text())["adapted"]
    did(merge_peft_adapter, "--adapter_model_name=sft --output_name=se")
    assert read_tensors(tmp_path / "se" / "rwkv-final.pth").keys() == read_tensors(base_model).keys()

    did(reward_modeling, RM, "--model_name_or_path", "sft", "--output_dir", "rm", *data)
    steps = read_jsonl(tmp_path / "rm" / "metrics.jsonl", "train")
    assert len(steps) == 6 and steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "--hf_access_token ***: no effect (files are local, nothing is downloaded)" in caplog.text
    assert "xxxxxx" not in caplog.text

    line = PPO.replace("--log_with=wandb", "")  # nothing may leave this machine
    did(rl_training, line, "--model_name=se", "--reward_model_name=rm", "--output_dir=rl", *data)
    steps = read_jsonl(tmp_path / "rl" / "metrics.jsonl", "train")
    assert len(steps) == 4 and steps[0]["lr"] == 1.4e-5 == steps[-1]["lr"]
    assert steps[0]["rewards/reward_model"] == steps[0]["reward"] and steps[0]["sampler_gap"] < 2e-2
    did(merge_peft_adapter, "--adapter_model_name=rl --output_name=aligned.pth")
    (tmp_path / "in.jsonl").write_text('{"prompt": "say 3"}\n')
    asked = f"--prompt_file in.jsonl --max_tokens 4 --strategy 'cpu fp32' --vocab_file {vocab_file} --temperature 0"
    answers = []
    for model in ("aligned.pth", "rl"):
        did(chat, asked, "--load_model", model, "--output", "out.jsonl")
        (answer,) = read_jsonl(tmp_path / "out.jsonl")
        answers.append(answer["logprobs"])
    assert answers[0] == pytest.approx(answers[1], rel=1e-3, abs=1e-3)


def test_a_stage_is_started_by_torchrun(base_model, vocab_file, orca, tmp_path):
    """If this breaks, `torchrun --nproc_per_node 2 rl_training.py ...`, as the pipeline's pages have it, starts two
    runs that do not know of each other, or none."""
    (tmp_path / "rewards.py").write_text(
        "def size(completion_ids, **_):\n    return [len(x) for x in completion_ids]\n"
    )
    words = ["--model_name", base_model, "--dataset_name", orca, "--tokenizer_name", vocab_file, "--steps=4"]
    words += [
        "--batch_size=4",
        "--mini_batch_size=2",
        "--ppo_epochs=1",
        "--output_max_length=4",
        "--gradient_accumulation_steps=1",
    ]
    words += [
        "--output_dir",
        tmp_path / "rl",
        "--reward_funcs",
        f"{tmp_path / 'rewards.py'}:size",
        "--precision",
        "fp32",
    ]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "rl_training.py")
    process = started(*words, program=launcher)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    steps = read_jsonl(tmp_path / "rl" / "metrics.jsonl", "train")
    assert len(steps) == 2 and (tmp_path / "rl" / "rwkv-final.pth").exists()
    assert all(step["reward"] == pytest.approx(step["completion_length"]) for step in steps)
    assert len(list((tmp_path / "rl").glob("rwkv-final.*"))) == 2  # one run wrote it, with its sidecar
