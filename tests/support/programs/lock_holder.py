"""Holds the lock of a project folder, as a run on another machine would, until it is killed: `lock_holder.py LOCK`."""

import fcntl
import sys

with open(sys.argv[1], "a+b") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(b'{"process": 12, "host": "there", "start": "2026-01-02T03:04:05"}')
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
