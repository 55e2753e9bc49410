"""What only tells of a run never ends it: logs, curves, the page, Weights & Biases."""

import os
import sys
import types

import pytest

from rwkv_rlhf.commands import train
from rwkv_rlhf.reports import journal
from rwkv_rlhf.reports.wandb_run import open_wandb
from rwkv_rlhf.training import callbacks


class Run:
    """A run at Weights & Biases whose connection is gone."""

    dir = "somewhere"

    def log(self, record, step):
        raise OSError("connection lost")

    def finish(self):
        raise OSError("connection lost")


@pytest.fixture
def wandb(monkeypatch):
    """The package, in which nobody is logged in; project names with a slash are refused."""
    module = types.ModuleType("wandb")
    module.run = None

    def init(project, mode="online", **about):
        if "/" in project:
            raise ValueError("Invalid project name")
        if mode == "online":
            raise RuntimeError("No API key configured")
        module.run = Run()
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def failing(*args, **named):
    raise UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")


def test_a_run_without_any_report(script, typed, text_jsonl, tmp_path, monkeypatch, wandb, caplog):
    """If this breaks, a page that cannot be written costs the run, or its resume point."""
    for module, name in ((callbacks, "append_json"), (callbacks, "log_epoch"), (journal, "write_page")):
        monkeypatch.setattr(module, name, failing)
    words = [*typed, "--data_file", text_jsonl, "--wandb", "mine", "--epoch_steps", 2, "--epoch_count", 2]
    status, _, err = script(train.main, *words)
    assert status == 0, err
    out = tmp_path / "out"
    assert (out / "rwkv-final.pth").exists() and {path.name for path in (out / "resume").glob("step-*")} == {
        "step-2",
        "step-4",
    }
    for text in ("metrics.jsonl", "report.html", "Weights & Biases lacks records", "kept offline"):
        assert caplog.text.count(text) == 1, text


def test_a_project_name_that_is_refused_is_said_before_the_model_is_loaded(refused, typed, text_jsonl, tmp_path, wandb):
    """If this breaks, a wrong name ends the run after an hour of reference scores."""
    words = [*typed, "--data_file", text_jsonl, "--wandb", "a/b", "--load_model", tmp_path / "empty.pth"]
    (tmp_path / "empty.pth").write_bytes(b"")
    refused(words, "--wandb a/b: Invalid project name")


def test_odd_names_reach_weights_and_biases_as_text(wandb, tmp_path, monkeypatch):
    """If this breaks, a file whose name is not UTF-8 cannot be logged."""
    told = {}
    monkeypatch.setattr(wandb, "init", lambda **about: told.update(about))
    odd = os.fsdecode(b"caf\xe9")
    open_wandb("mine", tmp_path / odd, {"data_file": odd, "lr_init": 0.1})
    assert told["config"] == {"data_file": "caf\\udce9", "lr_init": 0.1} and told["name"] == "caf\\udce9"
