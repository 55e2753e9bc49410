"""docs/data.md: its examples are read, and what it says of each is what is trained."""

import json
import re
from pathlib import Path

import pytest

from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.record import Chat, Document, Pair, Prompt, Rated
from rwkv_rlhf.data.templates.template import WORLD
from rwkv_rlhf.settings.shapes import KINDS, SHAPES
from tests.support.files import jsonl

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))


def pieces(cell):
    """(whether it is learnt, text) of each piece of code in a cell of the table."""
    found = re.findall(r"(\*\*)?`([^`]+)`", cell)
    return [(bool(bold), text.replace("\\n", "\n")) for bold, text in found]


def trained(item):
    """The same of what was read."""
    match item:
        case Document():
            return [(True, item.text)]
        case Chat():
            return [(span.answer and span.trained, span.text) for span in WORLD.spans(item.turns)]
        case Pair():
            prompt, answers = WORLD.render(item.turns, [item.chosen, item.reject])
            return [(False, prompt), (True, answers[0]), (False, answers[1])]
        case Rated():
            prompt, answers = WORLD.render(item.turns, [item.completion])
            return [(False, prompt), (True, answers[0])]
        case Prompt():
            return [(False, WORLD.prompt(item.turns))]


def test_the_page_has_every_shape():
    """A shape that is not on the page is not found by who needs it."""
    assert list(TABLE) == list(SHAPES)


@pytest.mark.parametrize("shape", TABLE)
def test_an_example_trains_what_the_page_says(shape, tmp_path):
    """If this breaks, somebody trains something else than the page promises."""
    example, _, says = TABLE[shape].partition(" | ")
    row = json.loads(re.findall(r"`([^`]+)`", example)[0])
    report = DataReport("")
    (found,) = read_items(jsonl(tmp_path / "a.jsonl", row), report, tuple(KINDS))
    assert f"({shape})" in report.found[0] and len(report.found) == 1
    said = [piece for piece in pieces(says) if not piece[1].startswith(("--", "chat.py"))]
    assert trained(found.item) == said
