"""What is timed once on a machine: on one core, and kept beside the compiled kernels."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from rwkv_rlhf.files import read_json_object, write_json
from rwkv_rlhf.ops.build import BuildError

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core, because others may be busy: waiting for each other would hide what something costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kept(
    folder: Callable[[], Path], name: str, key: str, read: Callable[[Any], Found], measure: Callable[[], Found]
) -> Found:
    """What the JSON file `name` in `folder()` says of `key`, as `read` takes it; measured, and written there, where it
    says nothing or `read` raises because it is damaged. `folder` may raise BuildError: then nothing is kept."""
    try:
        path: Path | None = folder() / name
    except BuildError:
        path = None
    known: dict[str, Any] = {}
    if path is not None and path.exists():
        try:
            known = read_json_object(path)
            return read(known[key])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # another machine's, or damaged
    found = measure()
    if path is not None:
        try:
            write_json(path, known | {key: found})
        except ValueError as error:
            log.debug("%s", error)
    return found
