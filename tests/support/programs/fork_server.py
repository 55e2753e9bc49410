"""Starts programs with the slow libraries imported: `fork_server.py SOCKET`, used by tests/support/forked.py.

Importing PyTorch and Lightning takes longer than most runs of the tests. This process does it once and makes a copy of
itself for each request on its SOCKET (a file descriptor), as long as the other end is open. Only libraries are
imported, nothing of this project, and no thread runs: each copy imports the package by itself.

A request is JSON, `{"words": ["train.py", ...], "cwd": ..., "environment": {...}}`, with four file descriptors: stdin,
stdout and stderr of the program, and a pipe for the number of its process. That is a child of the process of tests, not
of this one: a process between the two ends at once, and the tests, a subreaper, inherit the child.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

# what a training run imports first, in its order; what is missing is missed by the program, with its own sentence
LIBRARIES = (
    "torch",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torchmetrics",
    "pytorch_lightning",
    "pytorch_lightning.plugins",
    "bitsandbytes",
    "safetensors.torch",
    "yaml",
)


def preload() -> list[str]:
    """Import the libraries; returns where Python looks for modules behind PYTHONPATH."""
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    for name in LIBRARIES:
        with suppress(Exception):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in every copy"
    gc.collect()
    gc.freeze()  # the collector would write to pages that copies share
    return sys.path[1 + len(given) :]


def requests(channel: socket.socket) -> tuple[Any, list[int]]:
    """Forks at each request. Returns in the copies only, with the request and stdin, stdout, stderr."""
    while True:
        message, files, *_ = socket.recv_fds(channel, 1 << 20, 4)
        if not message:
            sys.exit(0)
        *pipes, answer = files
        between = os.fork()
        if not between:
            between, child = os.getpid(), os.fork()
            if not child:
                channel.close()
                os.close(answer)
                while os.getppid() == between:
                    time.sleep(0.001)
                return json.loads(message), pipes
            os.write(answer, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)  # then the child belongs to the test, which reads the number until the pipe is closed
        for file in files:
            os.close(file)


def become(request: Any, pipes: list[int], search: list[str]) -> list[str]:
    """Take over what the request says of the process; returns the program and its words."""
    for number, file in enumerate(pipes):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = list(request["words"])
    first = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0]))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *search]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # each process its own numbers, where nobody asks for certain ones
    return words


def run(words: list[str]) -> object:
    """Run a script, or a module behind -m; returns what it hands to sys.exit. KeyboardInterrupt passes."""
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def leave(code: object) -> NoReturn:
    """End as an interpreter does, but for freeing what was imported, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def main(channel: socket.socket) -> NoReturn:
    """Serve; in each copy run the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in the terminal of the tests
    search = preload()
    try:
        leave(run(become(*requests(channel), search)))
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
