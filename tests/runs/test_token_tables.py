"""Whole runs of RWKV-7a whose tables by token train: the rows that occur, in every way of running the same step."""

import json
import re

import pytest
import torch

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import merge, train
from rwkv_rlhf.plan import is_token_table

pytestmark = pytest.mark.slow

TABLES = ("--train_tables", 1)
LORA = (*TABLES, "--peft", "lora", "--lora_r", 2, "--lora_dropout", 0)


@pytest.fixture
def words(base_of, vocab_file, text_jsonl, tmp_path):
    """words(name, *more): those of a run of four optimizer steps into tmp_path/name."""

    def of(name, *more, version="x070a"):
        shared = ["--load_model", base_of(version), "--vocab_file", vocab_file, "--proj_dir", tmp_path / name]
        shared += ["--sft", 1, "--data_file", text_jsonl, "--precision", "fp32", "--accelerator", "cpu"]
        shared += ["--epoch_count", 1, "--epoch_save", 1, "--lr_init", "1e-3", "--lr_final", "1e-3"]
        return [*shared, "--weight_decay", 0.1, *more]

    return of


def test_rows_learn_and_runs_go_on(words, script, base_of, text_jsonl, tmp_path, caplog):
    """If this breaks, --train_tables 1 trains rows of tokens that never came, forgets what it did when it is stopped,
    or merge.py leaves it out. Micro-batches in chunks are one step, fp16 scales its loss."""
    caplog.set_level("INFO")

    def go(name, *more):
        status, _, err = script(train.main, *words(name, *more))
        assert status == 0, err
        return read_tensors(tmp_path / name / "rwkv-final.pth")

    whole = go("whole", *LORA, "--micro_bsz", 2, "--epoch_steps", 4, "--resume_every", 2)
    base, learnt = read_tensors(base_of("x070a")), {name for name in whole if is_token_table(name)}
    assert len(learnt) == 2 and "2 tables of DeepEmbed (s_emb) train" in caplog.text
    came = {byte + 1 for line in text_jsonl.read_text().splitlines() for byte in json.loads(line)["text"].encode()} | {
        0
    }
    for name in learnt:
        moved = {row for row, same in enumerate((whole[name] == base[name]).all(1).tolist()) if not same}
        assert moved and moved <= came
    again = go(
        "again", *LORA, "--micro_bsz", 2, "--epoch_steps", 4, "--resume", tmp_path / "whole" / "resume" / "step-2"
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    parts = ("--micro_bsz", 1, "--accumulate_grad_batches", 2, "--infctx", 1, "--chunk_ctx", 7)
    pieces = go("pieces", *LORA, *parts, "--epoch_steps", 8)
    half = go("half", *LORA, "--micro_bsz", 2, "--epoch_steps", 4, "--precision", "fp16")
    for name in learnt:
        moved = (whole[name] - base[name]).norm()
        for other, bound in ((pieces, 1e-3), (half, 0.3)):
            assert (other[name] - whole[name]).norm() < bound * moved, name
    merged = tmp_path / "merged.pth"
    status, _, err = script(
        merge.main,
        *("--base_model", base_of("x070a"), "--output", merged),
        *("--lora_checkpoint", tmp_path / "whole" / "rwkv-final.pth"),
    )
    assert status == 0, err
    assert all(torch.equal(read_tensors(merged)[name], whole[name]) for name in learnt)
    on = ("--load_adapter", tmp_path / "whole" / "rwkv-final.pth", "--micro_bsz", 2, "--epoch_steps", 1)
    assert learnt <= go("on", *on).keys() and "train_tables 1" in caplog.text.partition("as ")[2]


WRONG = {
    (
        "--strategy",
        "fsdp",
    ): "--train_tables 1 has gradients for the rows of some tokens only, and --strategy fsdp splits",
    ("--strategy", "deepspeed_stage_2"): "use --strategy ddp, or leave out --train_tables",
    ("--peft", "state"): "--train_tables 1: no block's tables would train; give --peft full or an adapter",
}


@pytest.mark.parametrize("more", WRONG)
def test_where_nothing_could_train_it_is_said(words, script, more):
    """If this breaks, --train_tables 1 is a silent no-op, or dies in the middle of the first step."""
    status, _, err = script(train.main, *words("out", *TABLES, *more))
    assert status == 2 and WRONG[more] in err and len(err.strip().splitlines()) == 1


def test_a_model_without_tables_is_refused(words, script):
    """If this breaks, somebody believes that tables trained of a model that has none."""
    status, _, err = script(train.main, *words("out", *TABLES, version="x070"))
    assert status == 2 and re.search(r"--train_tables 1: .*x070\.pth is an x070 model, and only x070a has such", err)
