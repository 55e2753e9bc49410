"""The picture and the page of a run, made from what lies in its folder."""

import json

import pytest

from rwkv_rlhf.reports.curves import draw_curves
from rwkv_rlhf.reports.page import open_run, run_page, write_page
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
