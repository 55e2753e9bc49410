"""The picture and the page of a run, made from metrics.jsonl alone."""

import json

import pytest

from rwkv_rlhf.reports.page import draw_curves, write_report
from tests.support.files import jsonl

PNG = b"\x89PNG"


@pytest.mark.usefixtures("curves")
def test_a_picture_of_what_was_logged(tmp_path):
    """If this breaks, a run that logged something has no curves, or they fail over a metric that a step lacks."""
    assert draw_curves(tmp_path) is None  # nothing was logged
    jsonl(
        tmp_path / "metrics.jsonl",
        {"event": "train", "step": 1, "loss": 2.0, "lr": 1e-3, "tokens_per_s": 9.0},
        {"event": "train", "step": 2, "loss": 1.0, "lr": 1e-3, "tokens_per_s": 9.0, "pref_percentage": 0.5},
        {"event": "val", "step": 2, "loss": 1.5, "kl": 0.1},
    )
    picture = draw_curves(tmp_path)
    assert picture == tmp_path / "curves.png" and picture.read_bytes()[:4] == PNG
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "val", "step": 3, "accuracy": 1.0}) + "\n" + '{"event": "tra')
    before = picture.read_bytes()
    assert draw_curves(tmp_path) == picture and picture.read_bytes() != before


@pytest.mark.usefixtures("curves")
def test_the_page_needs_no_network_and_quotes_what_it_shows(tmp_path):
    """If this breaks, a page is empty on a machine without network, or a file's name runs as HTML in it."""
    jsonl(tmp_path / "metrics.jsonl", {"event": "train", "step": 1, "loss": 2.0})
    write_report(tmp_path, {"data_file": "<script>alert(1)</script>", "lr_init": 0.001})
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "0.001" in page
