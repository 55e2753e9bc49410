"""The documentation as a site: it is built without a network, and a reader of it needs none."""

import re
import subprocess
import sys

import pytest

from tests.support.source_files import ROOT


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    """If this breaks, a page is in no menu, a link leads nowhere, or the reference names what is gone."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages.keys()
    assert "the file of preference pairs" in pages["messages"] and "token_scores" in pages["api"]
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?:[^\"]*)", text)
        assert not [address for address in loaded if "canonical" not in address], name
