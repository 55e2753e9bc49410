"""A progress bar on stderr for work whose size is known."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, label: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over `total` things; gives the function that says how many more are done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, disable=not shown or total < 2, file=sys.stderr, leave=False) as bar:
        yield bar.update
