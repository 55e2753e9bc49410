"""The commands that users type, flag by flag, one after the other on a two-layer model; only paths and sizes differ."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import chat
import make_binidx
import merge
import PrepareOrpoDataset
import rlhf_dpo_generate_save
import train
from tests.conftest import VOCAB, read_jsonl

PROFILE = Path(__file__).resolve().parent.parent / "layerprofile" / "2_TEST.csv"
COMMON = f"""--wandb "" --vocab_size {VOCAB} --epoch_begin 0 --epoch_save 1 --n_layer 2 --n_embd 64 --lr_init 5e-4
 --lr_final 1e-4 --warmup_steps 2 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 --accelerator auto --devices 1
 --precision bf16 --grad_cp 1 --my_testing "x070" --strategy auto --quant 1 --quant_mode 'nf4' --gpu_arch 'cuda'"""
DPO = """--infctx 0 --ctx_len 256 --epoch_steps 6 --epoch_count 2 --micro_bsz 2 --dpo 1 --dpo_alpha 0.1 --dpo_beta 0.01
 --rlhf_max_corpus_len 64 --accumulate_grad_batches 3"""
ORPO = """--ctx_len 256 --epoch_steps 4 --epoch_count 1 --micro_bsz 2 --orpo 1 --orpo_alpha 0.0004 --orpo_mode 1
 --rlhf_max_corpus_len 64"""


@pytest.fixture
def run(script, base_model, vocab_file, tmp_path):
    """run(main, words) with the model and the vocabulary; the script must succeed."""

    def call(main, words, model=True):
        words = shlex.split(words) if isinstance(words, str) else list(map(str, words))
        start = ["--load_model", base_model] if model else []
        status, out, err = script(main, *start, "--vocab_file", vocab_file, *words)
        assert status == 0, err
        return out, err

    return call


def test_prepare_dpo_merge_and_talk(run, script, pairs_csv, base_model, vocab_file, tmp_path):
    """If this breaks, the main road of this program is closed."""
    saved, folder = tmp_path / "pairs.save", tmp_path / "dpo"
    run(rlhf_dpo_generate_save.main, ["--input_csv", pairs_csv, "--output_save", saved, "--target_pair_count", 60])
    records = torch.load(saved, weights_only=True)
    assert len(records) == 60 and all(len(record) == 5 and record[3] < 0 for record in records)
    run(
        train.main,
        [*shlex.split(f"{COMMON} {DPO}"), "--proj_dir", folder, "--layer_profile", PROFILE, "--rlhf_train_file", saved],
    )
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4 and abs(steps[0]["margin"]) < 1e-3
    sidecar = json.loads((folder / "rwkv-1.json").read_text())
    assert sidecar["quant_mode"] == "nf4" and sidecar["adapted"]
    merged = tmp_path / "merged.pth"
    status, out, err = script(
        merge.main, "--base_model", base_model, "--lora_checkpoint", folder / "rwkv-1.pth", "--output", merged
    )
    assert status == 0 and "check:" in out, err
    (tmp_path / "in.jsonl").write_text('{"prompt": "say 3"}\n{"prompt": "say 4"}\n')
    asked = ["--prompt_file", tmp_path / "in.jsonl", "--temperature", 0, "--max_tokens", 8, "--strategy", "cpu fp32"]
    status, _, err = script(
        chat.main,
        *("--load_model", merged, "--vocab_file", vocab_file, "--output", tmp_path / "out.jsonl", *asked),
    )
    assert status == 0, err
    run(chat.main, [*asked, "--load_adapter", folder / "rwkv-1.pth", "--output", tmp_path / "both.jsonl"])
    for name in ("out.jsonl", "both.jsonl"):
        answers = read_jsonl(tmp_path / name)
        assert [set(a) for a in answers] == [{"prompt", "answer", "tokens", "logprobs"}] * 2
        assert all(len(a["tokens"]) == len(a["logprobs"]) > 0 and max(a["logprobs"]) <= 0 for a in answers)


def test_prepare_orpo_and_train_on_the_file(run, pairs_csv, tmp_path):
    """If this breaks, the ORPO recipe with its tiny alpha and summed scores does not run."""
    saved, folder = tmp_path / "orpo.save", tmp_path / "orpo"
    words = ["--input_csv", pairs_csv, "--output_save", saved, "--target_pair_count", 100]
    run(PrepareOrpoDataset.main, words)
    assert {tuple(record[3:]) for record in torch.load(saved, weights_only=True)} == {(0.5, 0.5)}
    run(
        train.main,
        [
            *shlex.split(f"{COMMON} {ORPO}"),
            "--proj_dir",
            folder,
            "--layer_profile",
            PROFILE,
            "--rlhf_train_file",
            saved,
        ],
    )
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4 and all(step["ce"] > 0 and step["odds"] > 0 for step in steps)


def test_binidx_and_pre_training_by_magic_prime(run, script, text_jsonl, vocab_file, tmp_path):
    """If this breaks, a corpus made here cannot be pre-trained on."""
    corpus, folder = tmp_path / "corpus", tmp_path / "pre"
    words = ["--input", text_jsonl, "--output", corpus, "--ctx_len", 16, "--vocab_size", VOCAB]
    run(make_binidx.main, words, model=False)
    sizes = shlex.split(f"--my_testing x070 --n_layer 2 --n_embd 64 --vocab_size {VOCAB} --load_model 0")
    status, _, err = script(train.main, *sizes, "--train_stage", 1, "--proj_dir", folder)
    assert status == 0, err
    run(
        train.main,
        [
            *("--load_model", 0, "--train_stage", 3, "--proj_dir", folder, "--data_file", corpus),
            *shlex.split(
                "--data_type binidx --ctx_len 16 --micro_bsz 4 --epoch_steps 5 --epoch_count 2 --epoch_save 1"
            ),
            *shlex.split("--lr_init 3e-3 --lr_final 1e-3 --precision fp32 --weight_decay 0.1 --my_exit_tokens 512"),
        ],
        model=False,
    )
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 8 and steps[-1]["loss"] < steps[0]["loss"]
