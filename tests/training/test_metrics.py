"""The table of metrics as people meet it: curves, progress bar, the choice of the best checkpoint, the page."""

import json

import pytest

from rwkv_rlhf.reports.curves import draw_curves
from rwkv_rlhf.settings.metrics import METRICS, panels
from rwkv_rlhf.training.callbacks import merit
from rwkv_rlhf.training.screen import shown
from tests.support.metrics_page import PAGE, text


def write_records(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def drawn(folder, monkeypatch):
    """title of each panel -> labels of what is drawn in it."""
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: figures.append(self))
    assert draw_curves(folder) == folder / "curves.png"
    return {axis.get_title(): [line.get_label() for line in axis.get_lines()] for axis in figures[0].axes}


def test_curves_draw_a_metric_under_its_one_name(tmp_path, monkeypatch):
    """If this breaks, a curve shows two quantities in one panel, or training and held out under different names."""
    train = {"event": "train", "loss": 0.7, "lr": 1e-4, "accuracy": 0.5, "pref_percentage": 0.5, "reward_margin": 0.1}
    val = {"event": "val", "step": 2, "loss": 3.0, "accuracy": 0.75, "reward_margin": 0.2, "kl": 0.01}
    write_records(tmp_path, train | {"step": 1}, train | {"step": 2}, val)
    found = drawn(tmp_path, monkeypatch)
    assert found["margin of rewards"] == ["reward_margin, training", "reward_margin, held out"]
    assert found["preference accuracy"] == ["pref_percentage, training", "accuracy, training", "accuracy, held out"]
    assert found["loss"] == ["loss, training"]  # the likelihood of chosen answers is not the loss of pairs
    assert found["KL to the start model, nats a token"] == ["kl, held out"]
    write_records(tmp_path, {"event": "train", "step": 1, "loss": 2.0}, {"event": "val", "step": 1, "loss": 2.1})
    assert drawn(tmp_path, monkeypatch) == {"loss": ["loss, training", "loss, held out"]}


def test_a_new_metric_is_drawn_and_shown(tmp_path, monkeypatch):
    """If this breaks, a metric needs a second list besides the table."""
    toy = next(iter(METRICS.values()))._replace(panel="toys", short="toy")
    monkeypatch.setitem(METRICS, "toy_margin", toy)
    write_records(tmp_path, {"event": "train", "step": 1, "toy_margin": 1.0, "loss": 1.0})
    assert drawn(tmp_path, monkeypatch)["toys"] == ["toy_margin, training"]
    assert shown({"toy_margin": 0.25, "loss": 1.0, "unheard_of": 1.0}) == {"loss": "1", "toy": "0.25"}
    assert panels()["toys"] == ["toy_margin"]


def test_the_bar_has_the_names_that_people_look_for():
    """If this breaks, the progress bar no longer shows what it promises."""
    record = {"loss": 1.0, "lr": 1e-4, "tokens_per_s": 123.456, "pref_percentage": 0.5, "accuracy": 1.0, "grad_norm": 2}
    assert list(shown(record)) == ["loss", "pref_percentage", "accuracy", "lr", "grad_norm", "tokens_per_s"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"loss": 1.0}, {"loss": 1.1}),
        ({"loss": 2.0, "accuracy": 0.8, "reward_margin": 0.1}, {"loss": 1.0, "accuracy": 0.7, "reward_margin": 9.0}),
        ({"loss": 2.0, "accuracy": 0.8, "reward_margin": 0.2}, {"loss": 1.0, "accuracy": 0.8, "reward_margin": 0.1}),
        ({"loss": 2.0, "accuracy": 0.8, "logp_margin": 0.2}, {"loss": 1.0, "accuracy": 0.8, "logp_margin": 0.1}),
        ({"loss": 2.0, "accuracy": 0.8}, {"loss": 1.0, "accuracy": 0.7}),  # good answers alone: no margin
    ],
)
def test_the_best_checkpoint_by_hand(better, worse):
    """If this breaks, rwkv-best is not the best, or --early_stop stops a run that still improves."""
    assert merit(better) > merit(worse)


def test_the_page_says_what_the_table_says():
    """If this breaks, docs/metrics.md is old: `python -m tests.support.metrics_page` writes it again."""
    assert PAGE.read_text(encoding="utf-8") == text()
