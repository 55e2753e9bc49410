"""Programs that tests run in processes of their own: those of tests/support/programs/ and the project's scripts."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.forked import AT_START, Forked, can_fork
from tests.support.source_files import ROOT

PROGRAMS = Path(__file__).resolve().parent / "programs"
OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def environment(**variables: object) -> dict[str, str]:
    """The environment of a child: the package is found, one thread, and what is given on top."""
    paths = os.pathsep.join(str(path) for path in (variables.pop("first_path", ""), ROOT / "src", ROOT) if path)
    return {**AT_START, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{n: str(v) for n, v in variables.items()}}


def interruptible() -> None:
    """In a child: SIGINT does what it does in a terminal. A shell's background jobs ignore it, and hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(
    *words: object,
    program: Sequence[object] = (sys.executable,),
    cwd: Path = ROOT,
    fresh: bool = False,
    pipes: Mapping[str, int] = OUTPUT,
    **variables: object,
) -> subprocess.Popen:
    """A process, its output in pipes of text: `started("train.py", "--help")`, by default at the project's root.

    Python's programs have PyTorch and Lightning imported already where that is possible (tests/support/forked.py) and
    the test is not about a program's start or memory (fresh).
    """
    command, place = [str(word) for word in (*program, *words)], environment(**variables)
    settings = {"cwd": cwd, "env": place, "text": True, **pipes}
    if not fresh and command[0] == sys.executable and can_fork(place):
        return Forked(command, **settings)
    return subprocess.Popen(command, preexec_fn=interruptible, **settings)


def started_ranks(*words: object, ranks: int = 2, **variables: object) -> list[subprocess.Popen]:
    """The processes of one run, as torchrun starts them; for tests that are not about who starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
    job |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, **variables}
    return [started(*words, RANK=rank, LOCAL_RANK=rank, **job) for rank in range(ranks)]


def end_of(*processes: subprocess.Popen, timeout: float = 300) -> str:
    """What they write to stdout, when they have ended; fails with the stderr of one that fails, and ends them all."""
    with ThreadPoolExecutor(len(processes)) as readers:
        done = [readers.submit(process.communicate, timeout=timeout) for process in processes]
        try:
            written = [one.result() for one in done]
        finally:
            for process in processes:
                process.kill()
    for process, (_, err) in zip(processes, written):
        assert process.returncode == 0, err[-5000:]
    return "".join(out for out, _ in written)


def run_program(name: str, *words: object, timeout: float = 300, **variables: object) -> str:
    """What tests/support/programs/<name>.py writes to stdout; fails with its stderr if it fails."""
    return end_of(started(PROGRAMS / f"{name}.py", *words, **variables), timeout=timeout)


# what the `rwkv` package must be told before its import, by kind of model
PACKAGE = {"older": {"v7": False}, "x070": {"v7": True}, "x070a": {"v7": True, "deep_embed": True}}


def package_kind(version: str) -> str:
    """Which of `PACKAGE` the models of this version are."""
    return version if version in PACKAGE else "older"


def rwkv_package(
    question: str, tokens: Sequence[int], paths: Sequence[Path], *, v7: bool, deep_embed: bool = False
) -> list:
    """The answer of the `rwkv` package to `question` (see programs/rwkv_package.py) for each checkpoint.

    paths: files without their ending. v7, deep_embed: whether they are RWKV-7, with the tables of RWKV-7a, which the
    package must be told before its import.
    """
    told = {"RWKV_V7_ON": int(v7), "RWKV_DE_VERSION": int(deep_embed), "RWKV_JIT_ON": 0}
    out = run_program("rwkv_package", question, json.dumps(list(tokens)), *paths, **told)
    return json.loads(out.splitlines()[-1])


def llama_cpp_prompts(model: Path, asked: Sequence[object]) -> list:
    """What llama.cpp makes of each of `asked` (texts, conversations, ids): see programs/llama_cpp_prompts.py."""
    origin = importlib.util.find_spec("xllamacpp").origin
    out = run_program("llama_cpp_prompts", model, json.dumps(asked), first_path=Path(origin).parents[1])
    return json.loads(out)
