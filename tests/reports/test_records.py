"""metrics.jsonl as columns: what a page is drawn from, again and again while a run writes on."""

import json

import numpy as np

from rwkv_rlhf.reports.panels import panels_of
from rwkv_rlhf.reports.records import Line, Records, ends, smoothed, thinned
from rwkv_rlhf.reports.words import change, duration, short_count, size
from tests.support.files import jsonl


def line(values):
    return Line(np.arange(len(values)), np.array(values, dtype=float))


def test_what_is_added_is_read_once(tmp_path):
    """If this breaks, a page lacks steps, has some twice after a resume, or mixes two runs of one folder."""
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    records.read()
    jsonl(path, {"event": "train", "step": 9, "loss": 9.0}, {"event": "begin", "run": "b"})
    with open(path, "a") as file:
        file.write('{"event": "train", "step": 1, "loss": 2.0}\n{"event": "train", "ste')
    records.read()
    assert records.train["loss"].line().values.tolist() == [2.0] and records.begin["run"] == "b"
    with open(path, "a") as file:
        file.write('p": 2, "loss": null, "kl": 0.5}\nno json\n' + json.dumps({"event": "resume", "step": 1}) + "\n")
    records.read()
    assert records.train["kl"].line().steps.tolist() == [2] and records.step == 2 and len(records.events) == 1
    other = jsonl(tmp_path / "new", {"event": "train", "step": 1, "loss": 3.0})
    other.rename(path)  # as a resumed run does with the lines that it writes again
    records.read()
    assert records.train["loss"].line().values.tolist() == [3.0] and not records.events


def test_means_by_hand():
    """If this breaks, a smoothed line lags behind its steps, or its ends are pulled towards 0."""
    assert smoothed(line([1, 2, 3])).values.tolist() == [1, 2, 3]  # too few for a mean
    values = np.arange(40.0)
    assert np.allclose(smoothed(line(values)).values[2:-2], values[2:-2])  # a straight line stays one
    assert smoothed(line(values)).values[0] == 1.0 and ends(line(values)) == (1.5, 37.5)
    assert ends(line([])) is None


def test_no_peak_is_lost():
    """If this breaks, a run of 100,000 steps makes a page of 50 MB, or a page hides the step that went wrong."""
    values = np.zeros(100_000)
    values[77_777], values[5] = 9.0, -9.0
    found = thinned(line(values), 600)
    assert len(found.values) <= 602 and found.values.max() == 9 and found.values.min() == -9
    assert found.steps[0] == 0 and found.steps[-1] == 99_999 and (np.diff(found.steps) > 0).all()


def test_one_quantity_stands_in_one_panel(tmp_path):
    """If this breaks, training and held-out accuracy are in two pictures, or two losses of different units in one."""
    pairs = {"event": "val", "step": 1, "loss": 9.0, "accuracy": 0.5}
    jsonl(tmp_path / "p", {"event": "train", "step": 1, "loss": 0.7, "accuracy": 0.5}, pairs)
    records = Records(tmp_path / "p")
    records.read()
    found = {
        panel["title"]: [line["label"] for line in panel["lines"] if line["kind"] != "raw"]
        for panel in panels_of(records)
    }
    assert found == {
        "loss": ["loss, training"],
        "loss of the held-out answers": ["loss, held out"],
        "preference accuracy": ["accuracy, training", "accuracy, held out"],
    }
    jsonl(tmp_path / "t", {"event": "train", "step": 1, "loss": 2.0}, {"event": "val", "step": 1, "loss": 2.1})
    records = Records(tmp_path / "t")
    records.read()
    (loss,) = panels_of(records)
    assert [line["label"] for line in loss["lines"] if line["kind"] != "raw"] == ["loss, training", "loss, held out"]


def test_words():
    """If this breaks, a time or a size on the screen reads wrong."""
    assert [duration(s) for s in (0, 89, 90, 3540, 3600, 90_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "59 min",
        "1 h 00 min",
        "1 d 1 h",
    ]
    assert [size(n) for n in (12, 2048, 5 << 20, 24 << 30)] == ["12 bytes", "2 KiB", "5 MiB", "24.0 GiB"]
    assert [short_count(n) for n in (658, 1100, 23_000)] == ["658", "1.1k", "23k"]
    assert change(0.5, 0.958) == "0.50 -> 0.96" and change(0.0, 0.0123) == "0.0000 -> 0.0123"
