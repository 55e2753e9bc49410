"""A progress bar on stderr for work whose size is known, and log lines above whatever bar there is."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def logging_to_stderr_of_now() -> Iterator[None]:
    """Inside, log lines go to what sys.stderr is now: a bar of rich puts a stream there that writes above it."""
    below = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is below
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(below)


@contextmanager
def progress_bar(total: int, label: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over `total` things; gives the function that says how many more are done.

    Only on a terminal: in a file there would be nothing but its last state.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not shown or total < 2 or not console.is_terminal)
    with bar, logging_to_stderr_of_now():
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
