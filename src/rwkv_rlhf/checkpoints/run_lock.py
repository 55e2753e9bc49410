"""One run at a time in a project folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rwkv_rlhf.files import is_left_behind, parse_json

log = logging.getLogger(__name__)

LOCK = ".run.lock"
HELD = {errno.EAGAIN, errno.EACCES}  # local file systems say the one, network file systems the other
LONGEST = 1000  # bytes that say who holds it


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder` inside the block; the file stays, empty. Where nothing can be locked, a warning says so.

    Raises ValueError that names the process, the machine and the start of the run that holds it.
    """
    path = folder / LOCK
    path.touch()
    try:
        file = _locked(path)
    except OSError as error:
        if error.errno in HELD:
            raise ValueError(_taken(folder)) from error
        log.warning("%s cannot be locked (%s): do not start a second run in it", folder, error.strerror)
        yield
        return
    with file:
        _remove_left_behind(folder)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "start": now}
        with suppress(OSError):  # of a full disk, which is said when something that counts is written
            path.write_text(json.dumps(owner))
        try:
            yield
        finally:
            with suppress(OSError):  # of a disk that failed: what the run says of it counts
                path.write_bytes(b"")


def _remove_left_behind(folder: Path) -> None:
    """Away with the checkpoints that runs had begun to write here when they were killed."""
    for path in folder.glob(".rwkv-*"):
        if is_left_behind(path):  # merge.py may be writing here too
            path.unlink(missing_ok=True)


def surely_ended(folder: Path) -> bool:
    """Whether a run that began in `folder` is known to be over, though it did not say so: nobody holds the lock.

    What another machine holds cannot always be seen from here, so its run counts as going on until it says otherwise.
    """
    path = folder / LOCK
    try:
        with open(path, "rb") as file:
            told = file.read(LONGEST)
        owner = parse_json(told)["host"] if told else socket.gethostname()
        if owner != socket.gethostname():
            return False
        _locked(path).close()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _locked(path: Path) -> BinaryIO:
    """The open file, locked: for reading, so that the disk can still be made read-only, where such a lock exists."""
    try:
        return _flocked(open(path, "rb"))  # the caller closes it
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    return _flocked(open(path, "r+b"))  # on NFS Linux locks bytes at the server, and asks for writing


def _flocked(file: BinaryIO) -> BinaryIO:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _taken(folder: Path) -> str:
    """The sentence for the second run."""
    try:
        with open(folder / LOCK, "rb") as file:
            owner = parse_json(file.read(LONGEST))
        who = f"process {owner['process']} on {owner['host']}, since {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "which has only just begun"
    return f"{{proj_dir}} {folder}: another run is writing there ({who}); wait for it, or give another folder"
