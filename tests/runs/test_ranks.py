"""Several processes train what one process would: the same losses, the same weights, one set of files."""

import json
import os
import signal
import sys
import time

import pytest
import torch

from rwkv_rlhf.commands import merge, train
from tests.support.files import has_stepped, read_jsonl
from tests.support.processes import PROGRAMS, end_of, started, started_ranks
from tests.support.rank_cases import case, shared_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ranks")]

CASES = ("sft", "dpo", "kto", "infctx", "lora", "tables", "empty", "grpo", "ppo")
BLOWN = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp")
AS_SFT = ("forgetful", "compiled")  # the same steps, and something happens besides
SPLIT = [  # (strategy, case): each strategy once, and what its kind of split could change
    *((strategy, "sft") for strategy in ("deepspeed_stage_1", "deepspeed_stage_3_offload")),
    *((strategy, case) for strategy in ("deepspeed_stage_3", "fsdp") for case in ("dpo", "empty", "state")),
    *(("deepspeed_stage_2", case) for case in ("infctx", "lora", "grpo", "ppo")),
    # moments that come back are the others' business too: tests/runs/test_resume_ranks.py
    *((strategy, "forgetful") for strategy in ("deepspeed_stage_2_offload", "fsdp")),
    *((strategy, "packed") for strategy in ("deepspeed_stage_1", "deepspeed_stage_3", "fsdp")),
    *((strategy, "compiled") for strategy in ("ddp", "deepspeed_stage_2", "fsdp")),
]


@pytest.fixture(scope="module")
def runs(base_of, vocab_file, text_jsonl, pairs_csv, tmp_path_factory):
    """(folders of one process, folders of two) by case."""
    folder = tmp_path_factory.mktemp("ranks")
    (text_jsonl.parent / "empty.jsonl").write_text(
        "\n".join(json.dumps({"text": "" if n % 4 in (2, 3) else f"line {n}"}) for n in range(24)) + "\n"
    )
    more = ("packed", "state", "forgetful", "compiled", "blown")
    words = {name: case(text_jsonl, pairs_csv, name) for name in (*CASES, *more)}
    wanted = [*(("ddp", name) for name in (*CASES, *more[:2])), *SPLIT, *((strategy, "blown") for strategy in BLOWN)]

    def shared(name):
        return shared_words(base_of("x070a" if name == "tables" else "x070"), vocab_file)

    lists = [
        [*shared(name), *words[name](2), "--strategy", how, "--proj_dir", folder / how / name] for how, name in wanted
    ]
    path = folder / "runs.json"
    path.write_text(json.dumps([[str(word) for word in one] for one in lists]))
    processes = started_ranks(PROGRAMS / "several_runs.py", path)
    for name in CASES:
        one = [*shared(name), *words[name](1), "--proj_dir", folder / "one" / name]
        train.main([str(word) for word in one])
    end_of(*processes, timeout=580)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_same_batch(runs, name):
    """If this breaks, a run on two devices learns something else than the same run on one."""
    same_run(runs / "one" / name, runs / "ddp" / name)


@pytest.mark.parametrize(("strategy", "name"), SPLIT)
def test_every_strategy_learns_the_same(runs, strategy, name):
    """If this breaks, splitting a model over devices changes what it learns, or what is saved."""
    same_run(runs / "ddp" / ("sft" if name in AS_SFT else name), runs / strategy / name)


@pytest.mark.parametrize("strategy", BLOWN)
def test_a_loss_that_is_no_number_ends_all_ranks_alike(runs, strategy):
    """If this breaks, a run that blew up on one rank hangs, or goes on with garbage on the others."""
    folder = runs / strategy / "blown"
    said = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert all(text.startswith("NonFiniteLoss") and "--max_bad_steps 1" in text for text in said), said
    assert len(read_jsonl(folder / "metrics.jsonl", "train")) == 1 and not list(folder.glob("rwkv-*"))


def same_run(one, two):
    """The same metrics, weights and files."""
    assert not list(two.glob("error*")), [path.read_text() for path in two.glob("error*")]
    rounded = one.name == "packed"  # in bf16 a difference in the last bit grows
    near = {"rel": 0.03, "abs": 0.005} if rounded else {"rel": 1e-5, "abs": 1e-6}
    for event in ("train", "val"):
        first, second = (read_jsonl(folder / "metrics.jsonl", event) for folder in (one, two))
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert a.keys() == b.keys()
            speeds = {key for key in a if key.endswith("tokens_per_s")}
            for key in a.keys() - speeds - {"sampler_gap", "memory", "event"}:
                assert b[key] == pytest.approx(a[key], **near), (
                    key,
                    a,
                    b,
                )
    a, b = (torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in (one, two))
    assert a.keys() == b.keys()
    for key, value in a.items():  # Adam's first steps are signs: compare where the gradient is not noise
        assert (value - b[key]).abs().mean() < (5e-4 if rounded else 2e-5), key
    logs = [(folder / "train_log.txt").read_text() for folder in (one, two)]
    assert [text.count("NEW RUN") for text in logs] == [1, 1]
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}


@pytest.fixture
def long_run(base_model, vocab_file, text_jsonl, tmp_path):
    """A run that nobody waits for: (words, folder)."""
    folder = tmp_path / "out"
    words = [*shared_words(base_model, vocab_file), "--sft", 1, "--data_file", text_jsonl, "--proj_dir", folder]
    return [*words, "--micro_bsz", 1, "--epoch_steps", 100000], folder


def begun(folder, *processes):
    """Returns when the run has made its first step."""
    deadline = time.monotonic() + 180
    while not has_stepped(folder) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [p.communicate()[1][-2000:] for p in processes]
        time.sleep(0.2)


def children(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(number) for number in file.read().split()]


def alive(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_that_dies_takes_the_others_along(long_run):
    """If this breaks, one killed process leaves the others waiting for it for ever, and nobody knows for which."""
    words, folder = long_run
    process = started("train.py", *words, "--devices", 2)
    begun(folder, process)
    (child,) = children(process)
    os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: rank 1 (process {child}) was killed by SIGKILL" in err and "Traceback" not in err


def test_a_rank_that_hangs_is_named(long_run):
    """If this breaks, a run in which one process stopped answering costs a night."""
    words, folder = long_run
    process = started("train.py", *words, "--timeout", 0.2, "--devices", 2)
    begun(folder, process)
    time.sleep(2)  # in which it says what it does
    (stopped,) = children(process)
    os.kill(stopped, signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: rank 1 (process {stopped} on " in err and "--timeout 0.2" in err, err[-3000:]
    assert "forward pass of micro-batch" in err and not alive(stopped)


def test_ctrl_c_to_one_rank_stops_all_and_saves(long_run):
    """If this breaks, stopping a run of several processes loses what it learnt, or leaves some running. Started as by
    srun."""
    words, folder = long_run
    job = {
        "SLURM_NTASKS": 2,
        "SLURM_STEP_ID": 0,
        "SLURM_NNODES": 1,
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": os.getpid(),
    }
    ranks = [started("train.py", *words, SLURM_PROCID=r, SLURM_LOCALID=r, **job) for r in range(2)]
    begun(folder, *ranks)
    ranks[1].send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], errors
    assert "saved" in errors[0] and "saved" not in errors[1]
    assert (folder / "rwkv-last.pth").exists()


def test_a_mistake_is_said_once(long_run, tmp_path):
    """If this breaks, a typing error is reported by each of 64 processes, hangs them, or is lost because the launcher
    (here torchrun, which has a status of its own) ends the rank that was about to say it."""
    words, _ = long_run
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "train.py")
    process = started(*words, "--data_file", tmp_path / "nothing.jsonl", program=launcher)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "exitcode  : 2" in err
    assert err.count("error: ") == 1 and err.count("nothing.jsonl") == 1, err


def test_checkpoints_of_split_models_merge(runs, script, base_model, tmp_path):
    """If this breaks, what was trained on several devices needs another tool to become a model."""
    for strategy, name in (("deepspeed_stage_3", "packed"), ("fsdp", "dpo")):
        adapter, merged = runs / strategy / name / "rwkv-final.pth", tmp_path / f"{name}.pth"
        status, _, err = script(
            merge.main, "--base_model", base_model, "--lora_checkpoint", adapter, "--output", merged
        )
        assert status == 0, err
        assert torch.load(merged, weights_only=True).keys() == torch.load(base_model, weights_only=True).keys()
