"""Processes that need not import PyTorch and Lightning anew, which takes 12 CPU-seconds: a server that has done it
makes copies of itself (programs/fork_server.py). One server serves a process of tests and ends with it.

A copy is a process like any other, with its number, signals, files and exit status. What it cannot have is another
beginning: variables that the interpreter or the libraries read while they start. A process that is given such ones is
not forked, and neither is any where there is a GPU (a driver does not survive a fork) or no Linux.
"""

import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SERVER = Path(__file__).resolve().parent / "programs" / "fork_server.py"
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# variables that a program reads when it runs, so that copies may differ in them; of others they may not
READ_LATE = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
LATE_NAMES = ("MASTER_", "SLURM_")
# as every command tells itself before it imports PyTorch, and one thread
FIXED = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MPLBACKEND": "agg"}
AT_START = dict(os.environ)  # what libraries set while they are imported is not handed down to programs


def _early(variables: Mapping[str, str]) -> dict[str, str]:
    return {n: text for n, text in variables.items() if n not in READ_LATE and not n.startswith(LATE_NAMES)}


class ForkServer:
    """A server and our end of its socket, which is all that keeps it alive."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """variables: the environment in which it imports."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, str(SERVER), str(theirs.fileno())]
            # pipes, since a copy writes to its own through the same Python objects
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()], **pipes)
        self.channel, self.copies = ours, 0

    def start(self, words: Sequence[str], cwd: str, variables: Mapping[str, str], pipes: Sequence[int]) -> int:
        """The number of a new process, a child of this one. Raises OSError if the server has ended."""
        request = json.dumps(
            {"words": [os.fspath(word) for word in words], "cwd": cwd, "environment": dict(variables)}
        ).encode()
        number, answer = os.pipe()
        with open(number, "rb") as file:
            try:
                socket.send_fds(self.channel, [request], [*pipes, answer])
            finally:
                os.close(answer)
            if found := file.read():
                self.copies += 1
                return int(found)
        self.channel.close()
        raise BrokenPipeError("the server that forks programs has ended: " + self.process.communicate()[0])


@functools.cache
def _servers(owner: int) -> list[ForkServer]:
    """The server of the process `owner`; none when servers cannot live here."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return [ForkServer(AT_START | FIXED)]


def _started(words: Sequence[str], cwd: str, variables: Mapping[str, str], pipes: Sequence[int]) -> int | None:
    """The number of a new process; None without a server."""
    servers = _servers(os.getpid())
    while servers:
        try:
            return servers[0].start(words, cwd, variables, pipes)
        except OSError as error:
            if servers[0].copies:  # somebody has ended it
                servers[0] = ForkServer(AT_START | FIXED)
            else:
                servers.clear()
                warnings.warn(f"{error}; programs start slowly", stacklevel=2)
    return None


def can_fork(variables: Mapping[str, str]) -> bool:
    """Whether a copy of the server can be a process with these variables."""
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return False
    return FIXED | _early(variables) == _early(AT_START | FIXED)


class Forked(subprocess.Popen[Any]):
    """A Popen of `[sys.executable, script or -m, ...]` whose process is a copy of the server.

    It takes cwd, env and the pipes. Python starts a process in the method that is replaced here; everything else of
    Popen needs only that the process is a child of this one.
    """

    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        cwd, env = more[4], more[5]
        ends = more[9:15]  # of stdin, stdout and stderr: where is read, where is written; -1: no pipe
        pipes = [own if file == -1 else file for own, file in enumerate((ends[0], ends[3], ends[5]))]
        where = os.path.abspath(cwd or os.curdir)
        number = _started(args[1:], where, env, pipes)
        if number is None:
            super()._execute_child(args, *more)
        else:
            self.pid, self._child_created = number, True
            self._close_pipe_fds(*ends)
