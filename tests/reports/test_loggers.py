"""The other places to which the figures of a run go."""

import csv
import json

import pytest

from rwkv_rlhf.reports.logger import numbers, open_loggers
from rwkv_rlhf.reports.wandb_run import WandbLog
from rwkv_rlhf.settings.loggers import LOGGERS, loggers
from tests.support.files import jsonl

BEFORE = [
    {"event": "begin", "run": "old"},
    {"event": "train", "step": 9, "loss": 9.0},
    {"event": "begin", "run": "new"},
    {"event": "start", "step": 0, "loss": 3.0, "accuracy": 0.5},
]
RECORDS = [
    {"event": "train", "step": 1, "loss": 2.0, "lr": 1e-3},
    {"event": "train", "step": 2, "loss": 1.0, "lr": 1e-3, "pref_percentage": 0.5},
    {"event": "val", "step": 2, "loss": 2.5, "accuracy": 0.75},
    {"event": "tasks", "step": 2, "tasks": {"piqa/acc": 0.5}},
]


def told(folder, name, records):
    """A run tells a logger of its records, and then its metrics.jsonl."""
    (logger,) = open_loggers(name, folder)
    for record in records:
        logger.add(record)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    logger.close()


def test_a_table_of_the_run(tmp_path):
    """If this breaks, a spreadsheet shows figures under wrong names, of another run, or twice after a resume."""
    jsonl(tmp_path / "metrics.jsonl", *BEFORE)
    told(tmp_path, "csv", RECORDS)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    expected = [BEFORE[-1], *RECORDS[:3], {"event": "tasks", "step": 2, "piqa/acc": 0.5}]
    assert rows == [{name: str(value) for name, value in record.items()} for record in expected]
    jsonl(tmp_path / "metrics.jsonl", *BEFORE, RECORDS[0])  # resumed after step 1
    told(tmp_path, "csv", RECORDS[1:])
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)] == rows


def test_tensorboard_shows_training_and_held_out_under_one_name(tmp_path):
    """If this breaks, TensorBoard shows nothing, or the same figure under two names."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(tmp_path, "tensorboard", RECORDS)
    found = {}
    for kind in ("train", "held_out"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / kind))
        events.Reload()
        found[kind] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train"]["loss"] == [(1, 2.0), (2, 1.0)] and found["train"].keys() == {"loss", "lr", "pref_percentage"}
    assert found["held_out"] == {"loss": [(2, 2.5)], "accuracy": [(2, 0.75)], "piqa/acc": [(2, 0.5)]}


def test_weights_and_biases_gets_the_same_names(tmp_path, monkeypatch):
    """If this breaks, curves of old projects stop, or held-out figures are drawn into those of training."""
    sent = []

    class Run:
        def log(self, figures, step):
            sent.append((step, figures))

        def finish(self):
            sent.append("end")

    monkeypatch.setattr("rwkv_rlhf.reports.wandb_run.open_wandb", lambda *about: Run())
    log = WandbLog("mine", tmp_path, {})
    for record in RECORDS[1:3]:
        log.add(record)
    log.close()
    assert sent == [(2, numbers(RECORDS[1])), (2, {"held_out/loss": 2.5, "held_out/accuracy": 0.75}), "end"]


def test_what_loggers_a_run_names(monkeypatch):
    """If this breaks, a typing error, or a package that is missing, is found out when the model is loaded."""
    assert [*loggers(" csv,tensorboard ")] == [*LOGGERS] and not loggers("")
    with pytest.raises(ValueError, match=r"\{logger\} cvs: cvs is none of csv, tensorboard"):
        loggers("cvs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboard needs the package tensorboard: pip install tensorboard"):
        loggers("tensorboard")
