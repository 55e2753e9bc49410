"""Runs command lines that need no PyTorch: argv[1] is {command: [words, ...]}; prints, for each command, of each line
its status, the last line of stderr, and whether PyTorch came. Every command has a process of its own."""

import contextlib
import io
import json
import os
import sys

from rwkv_rlhf.commands import main


def answer(words):
    """Status, last line of stderr, whether PyTorch is imported after it."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as done:
            status = done.code or 0
    return [status, (err.getvalue().splitlines() or [""])[-1], "torch" in sys.modules]


found = {}
for name, lines in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps([answer([name, *words]) for words in lines]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found[name] = json.loads(pipe.read())
    os.wait()
print(json.dumps(found))
