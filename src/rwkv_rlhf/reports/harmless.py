"""Logs, curves, bars and pages tell of a run; when one of them fails the run goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Harmless:
    """Inside `with harmless:` what raises is said once, in one warning that names `what`, and training goes on."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.said = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block; Ctrl+C and the like pass."""
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a run
            if not self.said:
                self.said = True
                log.warning("%s: %s: %s; training goes on", self.what, type(error).__name__, error)
