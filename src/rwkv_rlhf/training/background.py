"""One job at a time beside the training: writing what was copied before, while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one job in a thread. What it raises is raised again on the training thread, by the next call here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Run `job` when the one before is done; raises what that one raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="background save", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:  # raised again where it can be handled
            self._error = error

    def check(self) -> None:
        """Raise what the job raised, if it is done; returns at once."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when the job is done; raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
