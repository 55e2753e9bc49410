"""Several processes go on from a resume point as one does: the very bits, each rank with its own random numbers."""

import json

import pytest
import torch

from rwkv_rlhf.checkpoints.resume_points import last_point
from rwkv_rlhf.commands import train
from tests.support.files import read_jsonl
from tests.support.processes import PROGRAMS, end_of, started_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ranks")]

STRATEGIES = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp"]  # stage 1 keeps what stage 2 does
SPLIT = ("deepspeed_stage_3", "fsdp")
LORA = ("--peft", "lora", "--lora_dropout", 0.2)
# two mini-epochs of two steps; the point of step 3 lies in the middle of the second
KINDS = {
    "sft": ("--sft", 1, *LORA, "--accumulate_grad_batches", 2, "--epoch_steps", 4),
    "dpo": ("--dpo", 1, *LORA, "--quant", 0, "--epoch_steps", 2),
}
PIECES = ("--infctx", 1, "--chunk_ctx", 9)  # of the pairs, where parameters stay whole


@pytest.fixture(scope="module")
def runs(base_model, vocab_file, text_jsonl, pairs_csv, tmp_path_factory):
    """The folder with runs that were not stopped (`<strategy>/whole`), such that go on from their points (`again`), and
    one with another learning rate (`other`). The two processes are started once."""
    folder = tmp_path_factory.mktemp("resumed")
    lists = []
    for strategy in STRATEGIES:
        for kind, words in KINDS.items():
            data = ("--data_file", text_jsonl) if kind == "sft" else ("--rlhf_train_file", pairs_csv)
            words = ["--load_model", base_model, "--vocab_file", vocab_file, "--accelerator", "cpu", *data, *words]
            words += ["--strategy", strategy, "--ctx_len", 64, "--epoch_count", 2, "--epoch_save", 1, "--micro_bsz", 2]
            words += ["--resume_every", 1, *(PIECES if kind == "dpo" and strategy not in SPLIT else ())]
            whole, again = (folder / strategy / name / kind for name in ("whole", "again"))
            lists.append([*words, "--proj_dir", whole])
            lists.append([*words, "--proj_dir", again, "--resume", whole / "resume" / "step-3"])
    lists.append(
        [*lists[0][:-1], folder / "other", "--resume", folder / STRATEGIES[0] / "whole" / "sft", "--lr_init", 1]
    )
    path = folder / "runs.json"
    path.write_text(json.dumps([[str(word) for word in one] for one in lists]))
    end_of(*started_ranks(PROGRAMS / "several_runs.py", path), timeout=580)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_processes_go_on_bit_for_bit(runs, strategy, kind):
    """If this breaks, a run of several processes that was stopped ends elsewhere than one that was not."""
    whole, again = (runs / strategy / name / kind for name in ("whole", "again"))
    assert not list(again.glob("error*"))
    want, found = (torch.load(path / "rwkv-final.pth", weights_only=True) for path in (whole, again))
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)
    assert [r["loss"] for r in read_jsonl(whole / "metrics.jsonl", "train")][3:] == [
        r["loss"] for r in read_jsonl(again / "metrics.jsonl", "train")
    ]
    point = last_point(whole / "resume")
    assert point.about["world"] == 2
    random = [point.read(rank)["run"]["random"]["torch"] for rank in range(2)]
    assert not torch.equal(*random)


def test_a_point_of_two_processes_and_one(runs, script):
    """If this breaks, a run goes on with other ranks than it began with, and is silently another one."""
    words = json.loads((runs / "runs.json").read_text())[1]
    point = runs / STRATEGIES[0] / "whole" / "sft"
    status, _, err = script(train.main, *words, "--proj_dir", runs / "one", "--resume", point)
    assert status == 2 and "written by 2 processes, 1" in err and err.count("\n") == 1
    assert "{lr_init} was 0.0001, is 1.0" in (runs / "other" / "error-0.txt").read_text()
