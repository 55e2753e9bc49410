"""A headless Chromium for tests of pages, where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
QUIET = ("background-networking", "component-update", "sync")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that asks nobody for anything by itself; skips the test where there is none."""
    library = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next((path for path in CHROMIUM if Path(path).exists()), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    words = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{word}" for word in QUIET)]
    with library.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=words)
        yield found
        found.close()
