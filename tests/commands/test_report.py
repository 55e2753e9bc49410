"""`rwkv-rlhf report`: the page of a run again, and runs beside each other."""

import json

import pytest

from rwkv_rlhf.commands import report
from tests.support.files import jsonl
from tests.support.processes import PROGRAMS, started
from tests.support.run_folder import BEGIN, a_run


def test_one_run(script, tmp_path):
    """If this breaks, nobody gets the page of a run that was killed, or of one that an older program left."""
    a_run(tmp_path)
    status, out, _ = script(report.main, tmp_path)
    assert (status, out.strip()) == (0, str(tmp_path / "report.html")) and (tmp_path / "report.html").exists()


def test_two_runs(script, tmp_path):
    """If this breaks, one cannot see what two runs do differently, in settings, figures, curves and answers."""
    for name, rate in (("one", 1e-4), ("two", 2e-4)):
        folder = tmp_path / name
        folder.mkdir()
        a_run(folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
        settings = {"lr_init": rate, "loss": "dpo", "proj_dir": str(folder)}
        jsonl(folder / "metrics.jsonl", BEGIN | {"settings": settings}, *map(json.loads, lines))
    output = tmp_path / "c.html"
    status, out, err = script(report.main, tmp_path / "one", tmp_path / "two", "--output", output)
    assert (status, out.strip()) == (0, str(output)), err
    for run in ("one", "two"):  # the page of a run is not written over
        page = tmp_path / run / "report.html"
        status, _, err = script(report.main, tmp_path / "one", tmp_path / "two", "--output", page)
        assert status == 2 and "is the page of one of the runs" in err and not page.exists()
    page = output.read_text()
    different = page[page.index("Settings that differ") : page.index("<h2>Curves")]
    assert "<td>lr_init</td><td>0.0001</td><td>0.0002</td>" in different and "dpo" not in different
    assert "proj_dir" not in different and "one, step 80" in page and "two, step 80" in page
    panels = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (loss,) = [panel for panel in panels if panel["title"] == "loss"]
    assert [line["label"] for line in loss["lines"]] == [
        "one, training",
        "one, held out",
        "two, training",
        "two, held out",
    ]


@pytest.mark.parametrize("runs", [1, 2])
def test_it_needs_no_torch(tmp_path, runs):
    """If this breaks, looking at a run costs the time that PyTorch takes to load, or needs PyTorch on that machine."""
    a_run(tmp_path)
    process = started(PROGRAMS / "without_torch.py", "report", *[tmp_path] * runs, fresh=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.strip().endswith(".html"), err


def test_what_is_no_run(script, tmp_path):
    """If this breaks, a wrong folder gives a traceback or an empty page."""
    status, _, err = script(report.main, tmp_path / "nothing")
    assert status == 2 and "nothing is no folder of a run" in err
    a_run(tmp_path)
    assert script(report.main, tmp_path, tmp_path, "--output", tmp_path / "no" / "x.html")[0] == 2
