"""Numbers in sentences."""

import ast
import re

import pytest

from rwkv_rlhf.settings.counted import ONE, counted, predicated
from tests.support.source_files import ROOT


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 passes"), (1, "1 pass"), (1.0, "1 pass"), (0.5, "0.5 passes"), (2306, "2,306 passes")]
)
def test_a_number_with_its_noun(number, said):
    """If this breaks, a person reads "1 passes"."""
    assert counted(number, "pass", "passes") == said


def test_a_number_with_its_verb():
    """If this breaks, a person reads "1 rows have"."""
    assert [predicated(n, "row", "have `id`: not read") for n in (1, 2)] == [
        "1 row has `id`: not read",
        "2 rows have `id`: not read",
    ]
    assert predicated(1, "row", "repeat another one") == "1 row repeats another one"
    assert predicated(1, "row", "had thoughts") == "1 row had thoughts" and predicated(1, "row", "ask") == "1 row asks"


def remarks():
    """Every remark on rows in the sources, as it is written there."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "remark" in text else ():
            found = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "remark":
                found = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".remarks"):
                found = node.slice
            if found is not None:
                yield ast.unparse(found).lstrip("f").strip("'\"")


def test_remarks_have_one_verb_and_it_comes_first():
    """If this breaks, a remark on one row reads as if there were several."""
    found = list(remarks())
    assert len(found) > 8
    for text in found:
        first, *rest = re.findall(r"[a-z]+", text)
        assert first in (*ONE, "repeat", "say", "score", "ask"), text
        assert not set(rest) & set(ONE) - {"are"} or ":" in text, text
