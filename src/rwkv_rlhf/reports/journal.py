"""Keeps what a page tells of a running training, and rewrites the page now and then. Nothing here can stop a run."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from pathlib import Path

from rwkv_rlhf.reports import curves
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.metrics import METRICS
from rwkv_rlhf.reports.page import Run, write_page
from rwkv_rlhf.reports.records import Records
from rwkv_rlhf.reports.run_facts import RunFacts, write_facts

EVERY = 60.0  # seconds between two pages,
SHARE = 0.01  # and no more of a run's time than this


class Journal(logging.Handler):
    """While it is among the root logger's handlers each warning comes to stand on the page."""

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        super().__init__(logging.WARNING)
        self.folder, self.facts = folder, facts
        self.records = Records(folder / METRICS)
        self.harmless = Harmless("report.html is not written")
        self.step = 0
        self._next = time.monotonic() + EVERY

    def emit(self, record: logging.LogRecord) -> None:
        """A warning is said."""
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        self.facts.notice(now, self.step, record.getMessage())

    def __enter__(self) -> Journal:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)

    def tick(self) -> None:
        """Rewrite the page when it is time."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self, picture: bool = False) -> None:
        """Rewrite the page and what it is made from; with `picture` curves.png too."""
        began = time.monotonic()
        with self.harmless():
            self.facts.updated = datetime.now().isoformat(sep=" ", timespec="seconds")
            write_facts(self.folder, self.facts)
            self.records.read()
            write_page(Run(self.folder, self.records, self.facts))
        if picture:
            with self.harmless():
                curves.draw_curves(self.folder)
        now = time.monotonic()
        self._next = now + max(EVERY, (now - began) / SHARE)
