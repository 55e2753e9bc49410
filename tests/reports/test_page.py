"""The picture and the page of a run, made from what lies in its folder."""

import json
from datetime import datetime, timedelta

import pytest

from rwkv_rlhf.checkpoints.run_lock import LOCK, run_lock
from rwkv_rlhf.reports.compare import compare_page
from rwkv_rlhf.reports.curves import draw_curves
from rwkv_rlhf.reports.page import open_run, run_page, state_line, write_page
from rwkv_rlhf.reports.run_facts import facts_of, read_facts, write_facts
from tests.support.chromium import chromium
from tests.support.files import jsonl
from tests.support.run_folder import BEGIN, a_run

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with chromium() as found:
        yield found


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


def test_the_page_needs_no_network_and_quotes_what_it_shows(tmp_path):
    """If this breaks, a page is empty on a machine without network, or a file's name runs as HTML in it."""
    a_run(tmp_path)
    page = write_page(open_run(tmp_path)).read_text()
    assert "http" not in page and "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    for raw in ("<b>Hi", "<i>40", "<M>", "<nan>", "<p>"):
        assert raw not in page.replace("<p>1 of 9", ""), raw
    assert "&lt;b&gt;Hi?&lt;/b&gt;" in page and "not of this run" not in page
    assert "running: step 120 of 240 (50%), about 60 s left" in page
    assert "0.5 -&gt; 1" in page and "1 at step 120 (rwkv-best)" in page


def test_a_page_of_a_folder_without_facts_and_of_no_run(tmp_path):
    """If this breaks, a run of an older program has no page, or a folder that is none gives a traceback."""
    with pytest.raises(ValueError, match="is no folder of a run"):
        open_run(tmp_path)
    jsonl(tmp_path / "metrics.jsonl", BEGIN, {"event": "train", "step": 1, "loss": 2.0})
    for damaged in ("", "[]", '{"total": "many", "run": 7}'):
        (tmp_path / "report.json").write_text(damaged)
        assert "step 1" in run_page(open_run(tmp_path))


def test_a_run_that_was_killed_is_not_running(tmp_path):
    """If this breaks, the page of a run that is dead since Friday says that it runs, with the time that is left."""
    a_run(tmp_path)
    facts = read_facts(tmp_path)
    facts.updated = "2026-01-02 03:04:06"
    write_facts(tmp_path, facts)
    with run_lock(tmp_path):
        held = (tmp_path / LOCK).read_bytes()
        assert state_line(open_run(tmp_path)).startswith("running: step 120 of 240")
    (tmp_path / LOCK).write_bytes(held)  # as a kill leaves it
    said = "stopped without an end (last sign of life: 2026-01-02 03:04:06): step 120 of 240 (50%)"
    assert state_line(open_run(tmp_path)) == said
    assert read_facts(tmp_path).state == "running"  # a reader changes nothing
    (tmp_path / LOCK).write_text('{"process": 1, "host": "another", "start": "now"}')
    assert open_run(tmp_path).facts.state == "running"  # who knows
    assert facts_of(tmp_path, "another").total == 0 and facts_of(tmp_path, "").total == 240


def test_a_page_says_how_old_it_is(tmp_path, browser):
    """If this breaks, who opens the page of a killed run sees no sign of it."""
    a_run(tmp_path)
    facts = read_facts(tmp_path)
    for minutes, said in ((1, False), (45, True)):
        facts.updated = (datetime.now() - timedelta(minutes=minutes)).isoformat(sep=" ", timespec="seconds")
        write_facts(tmp_path, facts)
        page = browser.new_page()
        page.goto(write_page(open_run(tmp_path)).as_uri())
        assert (f"; last sign of life {minutes} min ago" in page.locator("#live").inner_text()) == said
        page.close()


def test_evaluation_tasks_stand_beside_each_other(tmp_path):
    """If this breaks, figures before and after training cannot be compared on the page, or between runs."""
    a_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step, value in ((0, 0.25), (120, 0.5)):
            file.write(json.dumps({"event": "tasks", "step": step, "tasks": {"piqa/acc": value, "odd": None}}) + "\n")
    run = open_run(tmp_path)
    page = run_page(run)
    assert "<th>task</th><th>figure</th><th>step 0</th><th>step 120</th>" in page
    assert "<td>piqa</td><td>acc</td><td>0.25</td><td>0.5</td>" in page
    assert "<td>piqa/acc</td><td>0.5</td><td>0.5</td>" in compare_page([run, run])


def numbers_in(text):
    return [float(word) for word in text.replace(",", "").split() if word.replace(".", "").isdigit()]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(tmp_path, browser, width, scheme):
    """If this breaks, curves are not drawn or cannot be read off, or the page asks a network or is too wide."""
    a_run(tmp_path)
    path = write_page(open_run(tmp_path))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    pictures = page.locator("#curves svg")
    assert pictures.count() == page.locator("#curves .panel").count() == 6
    first, second = (page.locator("#curves .panel").nth(number).bounding_box() for number in (0, 1))
    assert (first["y"] == second["y"]) == (width == 1280)  # two a row, on a phone one
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(numbers_in(colour.strip("rgb()"))) < 200) == (scheme == "dark")
    accuracy = page.locator("#curves .panel").filter(has_text="preference accuracy")
    box = accuracy.locator("svg")
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    page.mouse.move(place["x"] + 52 + (place["width"] - 60) * 80 / 120, place["y"] + 80)
    tip = accuracy.locator(".tip").inner_text()
    assert "step 80" in tip and "accuracy, held out: 0.8333" in tip and "accuracy, training: 0.833" in tip
    page.locator("select").select_option("40")
    shown = [text for text in page.locator(".answers pre").all() if text.is_visible()]
    assert [text.inner_text() for text in shown] == ["<i>0</i>", "<i>40</i>"]
    context.close()
    assert (said, asked) == ([], [path.as_uri()])
