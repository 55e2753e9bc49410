"""Processes killed at any moment, full and read-only disks, full memory: the last good files stay and are enough."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from rwkv_rlhf.checkpoints import resume_points as points_module
from rwkv_rlhf.checkpoints.resume_points import ResumePoints, last_point, points_in
from rwkv_rlhf.commands import train
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.out_of_memory import advice, is_out_of_memory
from tests.support.files import read_jsonl
from tests.support.processes import PROGRAMS, started
from tests.support.source_files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--ctx_len", 48, "--random_seed", 3, "--quant", 0),
        *("--lr_init", "1e-3", "--lr_final", "1e-4", "--peft", "lora", "--lora_dropout", 0.2, "--micro_bsz", 2),
    ]


def tensors(folder, name="rwkv-final.pth"):
    return torch.load(folder / name, weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A process that makes processes; `log` is where those write."""
    log = tmp_path_factory.mktemp("server") / "log"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started(PROGRAMS / "run_server.py", log, pipes=pipes) as process:
        process.log = log
        yield process
        process.stdin.close()


@pytest.mark.parametrize("loss", ["sft", "dpo", "ppo"])
def test_killed_at_random_moments(loss, typed, script, server, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, a machine that dies in the middle of a step or of a save takes the training with it."""
    data = ("--data_file", text_jsonl) if loss == "sft" else ("--rlhf_train_file", pairs_csv)
    words = [*typed, f"--{loss}", 1, *data, "--epoch_steps", 12, "--epoch_count", 2, "--accumulate_grad_batches", 2]
    if loss == "ppo":  # two updates to a rollout, two passes: three rollouts, with points inside of them
        words += ["--reward_funcs", f"{ROOT}/tests/support/rewards.py:odd,short", "--output_max_length", 5]
        words += ["--batch_size", 8, "--ppo_epochs", 2]
    words += ["--resume_every", 2, "--epoch_save", 1, "--keep", 1, "--resume", "auto"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert script(train.main, *words, "--proj_dir", whole)[0] == 0
    rng = random.Random(loss)
    line = " ".join(map(str, [*words, "--proj_dir", folder])) + "\n"
    kinds, statuses = ["save", "step"] if loss == "ppo" else ["save", "time", "save", "step"], []
    kills = len(kinds)
    while not statuses or statuses[-1]:
        server.stdin.write(line)
        server.stdin.flush()
        child = int(server.stdout.readline())
        if kinds:
            wait_for(kinds.pop(), folder, rng)
            os.kill(child, signal.SIGKILL)
        statuses.append(int(server.stdout.readline()))
        assert statuses[-1] in (0, -signal.SIGKILL), server.log.read_text()
    assert len(statuses) >= kills
    assert same(tensors(whole), tensors(folder))
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl", "train")] == list(range(1, 13))
    assert sorted(p.name for p in whole.glob("rwkv-*")) == sorted(p.name for p in folder.glob("rwkv-*"))
    assert not list((folder / "resume").glob(".*"))


def wait_for(kind, folder, rng):
    """Return when something is being saved, at a random moment of a step, or at any moment."""
    deadline = time.monotonic() + 60
    if kind == "time":
        time.sleep(rng.uniform(0.3, 2.5))
        return
    metrics = folder / "metrics.jsonl"
    begin = metrics.stat().st_size if metrics.exists() else 0
    while time.monotonic() < deadline:
        if kind == "save" and any((folder / "resume").glob(".step-*")):
            time.sleep(rng.uniform(0, 0.01))
            return
        if kind == "step" and metrics.exists() and metrics.stat().st_size > begin:
            time.sleep(rng.uniform(0, 0.2))
            return
        time.sleep(0.0005)


@contextmanager
def small_disk(folder, size):
    """A disk of so many bytes at `folder`; where nothing can be mounted, skips the test."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fresh(words, folder):
    return [*words, "--proj_dir", folder, "--resume", "auto"]


def test_a_full_disk_costs_nothing_that_was_saved(typed, script, text_jsonl, tmp_path):
    """If this breaks, a full disk ends in a torn resume point or checkpoint, a traceback, or a run that seems done."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 6, "--resume_every", 2, "--epoch_count", 1]
    assert script(train.main, *fresh(words, tmp_path / "whole"))[0] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "resume" / "step-6").iterdir())
    with small_disk(tmp_path / "disk", int(2.5 * size)) as disk:  # two points and a half
        status, _, err = script(train.main, *fresh(words, disk))
        assert status != 0 and "the disk is full" in err and "is whole" in err and err.count("\n") == 1, err
        assert not list((disk / "resume").glob(".*"))
        point = last_point(disk / "resume")
        assert point.about["step"] == 4
        shutil.copytree(disk, tmp_path / "larger")
    assert script(train.main, *fresh(words, tmp_path / "larger"))[0] == 0
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "larger"))


def test_a_point_that_is_too_large_for_the_file_system(tmp_path):
    """As a full disk, for machines where nothing can be mounted."""
    points = ResumePoints(tmp_path / "resume", {"settings": {}})
    place = {"step": 1, "epoch": 0, "done": 1}
    points.write(place, {"weights": {"a": torch.ones(10)}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match="step-2 cannot be written: File too large; step-1 is whole"):
            points.write(place | {"step": 2}, {"weights": {"a": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_point(tmp_path / "resume").about["step"] == 1
    assert len(list((tmp_path / "resume").iterdir())) == 1


def test_a_folder_that_becomes_read_only(typed, script, text_jsonl, tmp_path, monkeypatch):
    """If this breaks, a disk that fails goes unnoticed, and the run trains for nothing."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 6, "--resume_every", 1, "--epoch_count", 1]
    with small_disk(tmp_path / "disk", "20m") as disk:
        step, calls = TrainingModule.training_step, []

        def and_then_read_only(self, batch, index):
            calls.append(1)
            if len(calls) == 4:
                next(one.background for one in self.trainer.callbacks if hasattr(one, "background")).wait()
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            return step(self, batch, index)

        monkeypatch.setattr(TrainingModule, "training_step", and_then_read_only)
        status, _, err = script(train.main, *fresh(words, disk))
        assert status != 0 and err.count("\n") == 1 and "Read-only" in err, err
        assert last_point(disk / "resume").about["step"] == 3
        status, _, err = script(train.main, *fresh(words, disk))
        assert status == 2 and "cannot be written" in err


def test_ranks_meet_in_one_point(tmp_path):
    """If this breaks, a point of several processes lacks a part, or a part of an earlier attempt is taken for a new."""
    folder = tmp_path / "resume"
    ranks = [ResumePoints(folder, {"settings": {}}) for _ in range(2)]
    for rank, one in enumerate(ranks):
        one.join(rank, 2, "abc")
    place = {"step": 5, "epoch": 0, "done": 5}
    ranks[1].write(place, {"run": 1, "optimizer": torch.arange(3)})
    assert points_in(folder) == []
    ranks[0].write(place, {"run": 0})
    point = last_point(folder)
    assert point.about["world"] == 2 and point.read(0) == {"run": 0}
    assert torch.equal(point.read(1)["optimizer"], torch.arange(3)) and not list(folder.glob(".*"))


def test_a_rank_that_never_writes(tmp_path, monkeypatch):
    """If this breaks, rank 0 calls a point whole that is not, or waits for ever."""
    monkeypatch.setattr(points_module, "PATIENCE", 0.1)
    points = ResumePoints(tmp_path, {"settings": {}})
    points.join(0, 2, "abc")
    with pytest.raises(ValueError, match="rank 1 has not written"):
        points.write({"step": 1, "epoch": 0, "done": 1}, {"run": 0})
    assert list(tmp_path.iterdir()) == []


def test_values_and_tensors_come_back_exactly(tmp_path):
    """If this breaks, a moment, a generator or a counter of a resumed run differs in its last bit."""
    from rwkv_rlhf.checkpoints.tensor_tree import read_tree, write_tree

    tree = {
        "a": {0: torch.tensor(0.1, dtype=torch.float64), "n": (1, None, True, 0.1 + 0.2, "x", [float("inf")])},
        "b": [torch.randn(3, 5).bfloat16(), torch.empty(0), torch.randint(0, 99, (2, 3), dtype=torch.uint8).t()],
    }
    write_tree(tree, tmp_path / "t")
    again = read_tree(tmp_path / "t")
    assert again["a"]["n"] == tree["a"]["n"] and torch.equal(again["a"][0], tree["a"][0])
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tree["b"], again["b"]))
    assert set(again["a"]) == {0, "n"}


def test_bad_steps_count_on_after_a_resume(typed, script, text_jsonl, tmp_path, monkeypatch):
    """If this breaks, each restart forgives a run that has blown up."""
    step = TrainingModule.training_step
    monkeypatch.setattr(
        TrainingModule,
        "training_step",
        lambda self, batch, index: None if self._skip("a test", batch, index) else step(self, batch, index) * 0,
    )
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--max_bad_steps", 2]
    words += ["--resume_every", 1, "--proj_dir", tmp_path / "out", "--resume", "auto"]
    status, _, err = script(train.main, *words, "--epoch_count", 1)
    assert status == 1 and "all 2 optimizer steps were left out" in err
    assert not list((tmp_path / "out").glob("rwkv-*"))  # nothing was learnt
    status, _, err = script(train.main, *words, "--epoch_count", 2)
    assert status == 1 and "--max_bad_steps 2" in err and "it is not the rate" in err


def test_out_of_memory_names_three_flags_and_keeps_what_is_done(typed, script, text_jsonl, tmp_path, monkeypatch):
    """If this breaks, a run that does not fit ends in a traceback without advice, or loses its last steps."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 6, "--epoch_count", 1]
    words += ["--resume_every", 0, "--ctx_len", 1024]
    assert script(train.main, *fresh(words, tmp_path / "whole"))[0] == 0
    step, calls = TrainingModule.training_step, []

    def too_large(self, batch, index):
        calls.append(1)
        if len(calls) == 4:
            torch.empty(1 << 60, dtype=torch.uint8)
        return step(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", too_large)
    status, _, err = script(train.main, *fresh(words, tmp_path / "out"))
    assert status == 1 and err.count("\n") == 1 and "--quant 1 --quant_mode nf4" in err
    assert "--micro_bsz 1 --accumulate_grad_batches 2" in err and "--infctx 1 --chunk_ctx 512" in err
    assert last_point(tmp_path / "out" / "resume").about["step"] == 3
    assert script(train.main, *fresh(words, tmp_path / "out"))[0] == 0
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"grad_cp": False, "loss": "sft"}, "{grad_cp} 1"),
        ({"peft": "lora", "quant": False, "loss": "dpo"}, "{quant} 1 {quant_mode} nf4"),
        ({"loss": "sft"}, "{peft} lora"),
        ({"peft": "lora", "quant": True, "loss": "dpo", "rlhf_max_corpus_len": 4096}, "{infctx} 1 {chunk_ctx} 512"),
        ({"peft": "lora", "quant": True, "loss": "sft", "infctx": True, "ctx_len": 8192}, "{chunk_ctx} 256"),
    ],
)
def test_memory_advice_is_about_this_run(settings, first):
    """If this breaks, the advice names what the run already has."""
    found = advice(Config(**settings))
    assert found[0] == first and len(found) == 3


def test_what_counts_as_out_of_memory():
    """If this breaks, another error is taken for a lack of memory, or a lack of memory for another error."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("a shape is wrong")) and not is_out_of_memory(ValueError("memory"))
