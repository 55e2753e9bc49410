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
from contextlib import contextmanager
from pathlib import Path

from rwkv_rlhf.files import parse_json

log = logging.getLogger(__name__)

LOCK = ".run.lock"
HELD = {errno.EAGAIN, errno.EACCES}  # local file systems say the one, network file systems the other
LONGEST = 1000  # bytes that say who holds it


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder` inside the block; the file stays, empty. Where nothing can be locked, a warning says so.

    Raises ValueError that names the process, the machine and the start of the run that holds it.
    """
    with open(folder / LOCK, "a+b") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on NFS Linux locks the file's bytes at the server
        except OSError as error:
            if error.errno in HELD:
                raise ValueError(_taken(folder)) from error
            locked = False
            log.warning("%s cannot be locked (%s): do not start a second run in it", folder, error.strerror)
        if not locked:
            yield
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "start": now}
        file.truncate(0)
        file.write(json.dumps(owner).encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _taken(folder: Path) -> str:
    """The sentence for the second run."""
    try:
        with open(folder / LOCK, "rb") as file:
            owner = parse_json(file.read(LONGEST))
        who = f"process {owner['process']} on {owner['host']}, since {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "which has only just begun"
    return f"{{proj_dir}} {folder}: another run is writing there ({who}); wait for it, or give another folder"
