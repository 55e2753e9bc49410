"""Whole runs of `--compile 1` beside the same without it: a graph that is run as it was taken gives the same bits."""

import functools

import pytest
import torch

from rwkv_rlhf.commands import train
from rwkv_rlhf.model.rwkv import RWKV
from tests.support.files import read_jsonl
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow

ADAPTED = ("--peft", "lora", "--lora_r", 4, "--quant", 0, "--lora_dropout", 0.1)
MOST_GRAPHS = (
    14  # of a run: block 0 and the others, first states, carried ones, those of a last chunk; lengths do not count
)
REWARDS = f"{ROOT}/tests/support/rewards.py:odd,short"
KINDS = {
    "recomputed blocks": ("--sft", 1, "--micro_bsz", 2, *ADAPTED, "--dropout", 0.1, "--grad_cp", 1),
    "infinite context": ("--sft", 1, "--micro_bsz", 1, "--infctx", 1, "--chunk_ctx", 9, "--state_offload", 1),
    "learnt states": ("--sft", 1, "--micro_bsz", 2, "--state", 1),
    "groups": ("--grpo", 1, "--micro_bsz", 1, "--grpo_gen_count", 2, "--grpo_gen_length", 4, "--reward_funcs", REWARDS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_run_is_the_plain_one(
    script, monkeypatch, base_model, vocab_file, text_jsonl, pairs_csv, tmp_path, kind
):
    """If this breaks, `--compile 1` learns something else in this kind of run, or a stopped one ends elsewhere."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(RWKV, "compile_blocks", functools.partialmethod(RWKV.compile_blocks, backend))
    data = ("--data_file", text_jsonl) if kind != "groups" else ("--rlhf_train_file", pairs_csv)
    words = ["--load_model", base_model, "--vocab_file", vocab_file, *data, *KINDS[kind], "--precision", "fp32"]
    words += ["--ctx_len", 64, "--random_seed", 3, "--epoch_steps", 3, "--epoch_count", 1, "--resume_every", 1]
    plain, whole, again = (tmp_path / name for name in ("plain", "whole", "again"))
    more = {plain: (), whole: ("--compile", 1), again: ("--compile", 1, "--resume", whole / "resume" / "step-2")}
    for folder, flags in more.items():
        torch._dynamo.reset()  # a run that goes on compiles anew
        graphs.clear()
        status, _, err = script(train.main, *words, *flags, "--proj_dir", folder)
        assert status == 0, err
        assert bool(graphs) == (folder != plain) and len(graphs) <= MOST_GRAPHS
    steps = {folder: read_jsonl(folder / "metrics.jsonl", "train") for folder in more}
    numbers = {folder: [(r["loss"], r["grad_norm"]) for r in records] for folder, records in steps.items()}
    assert numbers[whole] == numbers[plain] and numbers[again] == numbers[plain][2:] and len(numbers[plain]) == 3
    weights = [torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in more]
    for name, x in weights[0].items():
        assert all(torch.equal(one[name], x) for one in weights[1:]), name
