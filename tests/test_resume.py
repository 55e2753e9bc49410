"""A run that is stopped anywhere and resumed ends with the very bits of one that was not."""

import json
import shutil

import pytest
import torch

import train
from src.training.callbacks import Log
from src.training.module import Trainee
from src.training.points import points_in
from tests.conftest import read_jsonl


class Cut(Exception):
    """Stands for the end of the process: nothing after it may help the run."""


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--ctx_len", 48, "--random_seed", 3),
        *("--lr_init", "1e-3", "--lr_final", "1e-4", "--warmup_steps", 2, "--resume_every", 1),
    ]


TEXT = ("--sft", 1, "--micro_bsz", 3)
PAIRS = ("--dpo", 1, "--micro_bsz", 2)
LORA = ("--peft", "lora", "--lora_dropout", 0.2, "--quant", 0)
LONG = ("--epoch_steps", 3, "--epoch_count", 2)
TWO = ("--accumulate_grad_batches", 2, "--epoch_steps", 6, "--epoch_count", 1)
KINDS = {
    "sft full": (*TEXT, "--quant", 0, "--precision", "fp32", *LONG),
    "sft lora accumulated": (*TEXT, *LORA, *TWO),
    "sft infinite context": (*TEXT, *LORA, "--infctx", 1, "--chunk_ctx", 16, "--infctx_dataset_multiplier", 2, *LONG),
    "sft pissa": (*TEXT, "--peft", "pissa", "--quant", 0, *LONG),
    "sft nf4 dora": (*TEXT, "--peft", "dora", "--lora_dropout", 0.1, *LONG),
    "sft states": (*TEXT, "--state", 1, "--quant", 0, *LONG),
    "sft growing": (*TEXT, *LORA, "--initial_ctx_len", 8, "--ctx_warmup_steps", 4, *TWO),
    "dpo lora": (*PAIRS, *LORA, *LONG, "--keep", 1, "--epoch_save", 1),
    "dpo infinite context": (*PAIRS, *LORA, "--infctx", 1, "--chunk_ctx", 8, *TWO),
    "dpo nf4 pissa": (*PAIRS, "--peft", "pissa", *LONG),
    "kto": ("--kto", 1, "--micro_bsz", 4, *LORA, *TWO),
}


def words_for(kind, typed, text_jsonl, pairs_csv):
    words = [*typed, *KINDS[kind]]
    return [*words, "--data_file", text_jsonl] if "--sft" in words else [*words, "--rlhf_train_file", pairs_csv]


def tensors(folder, name="rwkv-final.pth"):
    return torch.load(folder / name, weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def run(script):
    def go(*words, status=0):
        found, _, err = script(train.main, *words)
        assert found == status, err
        return err

    return go


@pytest.fixture
def cut_at(monkeypatch):
    """cut_at(k): the k-th micro-batch from now never comes."""

    def cut(k):
        step, left = Trainee.training_step, [k]

        def counted(self, batch, index):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return step(self, batch, index)

        monkeypatch.setattr(Trainee, "training_step", counted)
        return lambda: monkeypatch.setattr(Trainee, "training_step", step)

    return cut


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_the_same_bits_in_the_end(kind, typed, run, cut_at, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, a run that was stopped in the middle ends elsewhere than one that was not."""
    words = words_for(kind, typed, text_jsonl, pairs_csv)
    whole = tmp_path / "whole"
    run(*words, "--proj_dir", whole)
    folder = tmp_path / "parts"
    for k in (1, 3, 1):  # before the first step, or in the middle of one
        free = cut_at(k)
        run(*words, "--proj_dir", folder, "--resume", "auto", status=1)
        free()
    run(*words, "--proj_dir", folder, "--resume", "auto")
    assert same(tensors(whole), tensors(folder))
    want, found = (read_jsonl(path / "metrics.jsonl", "train") for path in (whole, folder))
    assert [(r["step"], r["loss"], r["lr"]) for r in want] == [(r["step"], r["loss"], r["lr"]) for r in found]
    assert len(want) == (6 if "2" == str(words[words.index("--epoch_count") + 1]) else 3)
    assert sorted(p.name for p in whole.glob("rwkv-*")) == sorted(p.name for p in folder.glob("rwkv-*"))
