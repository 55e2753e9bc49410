"""Copies of the server that has imported PyTorch are processes like new ones; else tests judge another program."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support import forked
from tests.support.processes import PROGRAMS, environment, started

PROGRAM = PROGRAMS / "about_process.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(390),
    pytest.mark.skipif(not forked.can_fork(environment()), reason="nothing is forked here"),
]


@pytest.mark.parametrize("end", ["e0", "e7", "a sentence", str(int(signal.SIGINT)), str(int(signal.SIGKILL))])
def test_a_copy_is_what_a_new_process_is(tmp_path, end):
    """Its name, words, folder, files, parent, variables, exit status and what it says at its end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    found = []
    for fresh in (True, False):
        with started(PROGRAM, end, cwd=tmp_path, fresh=fresh, pipes=pipes, RANK=3) as process:
            assert isinstance(process, forked.Forked) != fresh
            out, err = process.communicate("from stdin", timeout=300)
        about = json.loads(out)
        assert about[:2] == [process.pid, os.getpid()]
        found.append((about[2:], process.returncode, err.splitlines()[-1:]))
    assert found[0] == found[1]


def test_what_is_read_at_the_start_of_a_program_is_not_forked():
    """If this breaks, a test of such a variable passes whatever the program does with it."""
    for name in ("OMP_NUM_THREADS", "PYTHONHASHSEED", "LD_PRELOAD", "TRITON_INTERPRET", "HOME", "LC_ALL"):
        assert not forked.can_fork(environment(**{name: "2"}))


def test_a_server_that_ends_costs_time_only(monkeypatch, tmp_path):
    """If this breaks, one process that the system kills takes all later tests with it."""
    server = forked.ForkServer(environment())
    server.process.kill()
    with pytest.raises(OSError, match="has ended"):
        server.start([str(PROGRAM), "e0"], str(tmp_path), environment(RANK=0), (0, 1, 2))
    monkeypatch.setattr(forked, "_servers", lambda owner: [server])
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with pytest.warns(UserWarning, match="start slowly"):
        process = forked.Forked([sys.executable, PROGRAM, "e0"], env=environment(RANK=0), **pipes)
    assert process.communicate(timeout=60)[0] and process.returncode == 0
