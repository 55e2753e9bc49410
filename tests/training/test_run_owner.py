"""A project folder belongs to one run: at a time by a lock, over time by run.json."""

import os
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest

from rwkv_rlhf.checkpoints.run_lock import LOCK, run_lock
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.reports.metrics import read_records
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.run_identity import identity
from rwkv_rlhf.training.run_owner import (
    archive,
    begin_run,
    goes_on,
    refuse_another_runs_folder,
    refuse_another_start,
)
from tests.support.files import jsonl
from tests.support.processes import PROGRAMS


def made(*words):
    """A Config of a text run with these words."""
    return parse(["--load_model", "M", "--data_file", "D", *map(str, words)])


@pytest.fixture
def used(tmp_path):
    """A folder in which a run with the default settings has saved, logged and left a user's file alone."""
    config = made()
    begin_run(tmp_path, identity(config), {"lr_init": 1.0}, None)
    for name in ("rwkv-0.pth", "rwkv-0.json", "rwkv-best.pth", "rwkv-0-state.pth", "train_log.txt", "notes.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def refuse(folder, *words):
    config = made(*words)
    refuse_another_runs_folder(config, folder, identity(config))


def test_a_second_run_is_told_who_writes_there(tmp_path):
    """If this breaks, two runs mix their lines and checkpoints; a dead one must not block the folder."""
    command = [sys.executable, PROGRAMS / "lock_holder.py", tmp_path / LOCK]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"process 12 on there, since 2026-01-02T03:04:05"), run_lock(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run_lock(tmp_path), pytest.raises(ValueError, match="another run is writing there"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_what_a_killed_run_had_begun_to_write_goes(tmp_path):
    """If this breaks, every kill in the middle of a save leaves gigabytes in the folder, under a hidden name."""
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    left = tmp_path / f".rwkv-2.pth.{dead.pid}-0123abcd.tmp"
    writing = tmp_path / f".rwkv-final.pth.{os.getpid()}-0123abcd.tmp"
    other = tmp_path / f".merged.pth.{dead.pid}-0123abcd.tmp"
    for path in (left, writing, other):
        path.touch()
    with run_lock(tmp_path):
        assert (left.exists(), writing.exists(), other.exists()) == (False, True, True)


def test_results_of_other_settings_are_not_written_over(used):
    """If this breaks, rwkv-best is another run's than rwkv-final, and the wrong one is merged."""
    refuse(used)
    refuse(used, "--epoch_count", 3, "--keep", 2)  # changes nothing in what is trained
    for words in (("--lr_init", 1), ("--sft", 1), ("--peft", "lora")):
        with pytest.raises(
            ValueError, match=r"holds rwkv-0\.pth, rwkv-best\.pth of a run with other settings \("
        ) as told:
            refuse(used, *words)
        assert all(f"{{{flag}}}" in str(told.value) for flag in ("archive", "force", "resume"))
        refuse(used, *words, "--force", 1)
    (used / "run.json").unlink()  # as older programs left it
    with pytest.raises(ValueError, match=r"of another run \(no run\.json says which\)"):
        refuse(used)
    for name in ("rwkv-0.pth", "rwkv-best.pth"):
        (used / name).unlink()
    refuse(used, "--lr_init", 1)  # a run that saved nothing


def test_another_model_is_another_run(used):
    """If this breaks, the folder's checkpoints are of two base models, and merging takes the wrong one."""
    models = [used / "one.pth", used / "two.pth"]
    for model in models:
        model.write_text(model.name)
    begin_run(used, identity(made()), {}, None, file_hash(models[0]))
    refuse(used, "--load_model", models[0])
    with pytest.raises(ValueError, match=r"of a run with other settings \(\{load_model\} is another model\)"):
        refuse(used, "--load_model", models[1])


def test_the_old_run_is_moved_whole(used):
    """If this breaks, an archived run lacks the sidecar or the curves that explain it, or a user's file is moved."""
    refuse(used, "--lr_init", 1, "--archive", 1, "--dry_run", 1)
    assert (used / "rwkv-0.pth").exists()
    refuse(used, "--lr_init", 1, "--archive", 1)
    (old,) = used.glob("old-*")
    moved = [
        "metrics.jsonl",
        "run.json",
        "rwkv-0-state.pth",
        "rwkv-0.json",
        "rwkv-0.pth",
        "rwkv-best.pth",
        "train_log.txt",
    ]
    assert sorted(path.name for path in old.iterdir()) == moved
    assert sorted(path.name for path in used.iterdir()) == ["notes.txt", old.name]
    (used / "rwkv-0.pth").write_text("")
    with pytest.raises(ValueError, match=r"\{load_model\} .*rwkv-0\.pth is among what"):
        archive(made("--load_model", used / "rwkv-0.pth"), used)


def test_what_begins_from_the_folder_goes_on_in_it(used, tmp_path):
    """If this breaks, pre-training or an adapter cannot be continued where it lies."""
    assert goes_on(made("--load_adapter", used / "rwkv-0.pth"), used, None)
    assert not goes_on(made("--load_adapter", tmp_path / "other" / "rwkv-0.pth"), used, None)
    assert goes_on(parse(["--load_model", "0", "--train_stage", "3", "--data_file", "D"]), used, None)


def test_initial_values_under_checkpoints_stay(used):
    """If this breaks, --train_stage 1 replaces the model that a pre-training run began from."""
    config = parse(["--train_stage", "1", "--load_model", "0", "--my_testing", "x070", "--vocab_size", "257"])
    refuse_another_start(config, used)
    (used / "rwkv-init.pth").write_text("")
    with pytest.raises(ValueError, match=r"rwkv-init\.pth and rwkv-0\.pth, which began from it"):
        refuse_another_start(config, used)


def test_curves_are_those_of_the_last_run(tmp_path):
    """If this breaks, the curve of a second run in a folder begins with the first one's steps."""
    step = {"event": "train", "step": 1, "loss": 2.0}
    jsonl(tmp_path / "metrics.jsonl", step, {"event": "begin", "run": "x"}, step | {"loss": 1.0}, {"event": "resume"})
    assert [record["loss"] for record in read_records(tmp_path / "metrics.jsonl", "train")] == [1.0]
