"""Programs that tests run in processes of their own: those of tests/support/programs/ and the project's scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.source_files import ROOT

PROGRAMS = Path(__file__).resolve().parent / "programs"


def environment(**variables: object) -> dict[str, str]:
    """The environment of a child: the package is found, one thread, and what is given on top."""
    paths = os.pathsep.join(str(path) for path in (variables.pop("first_path", ""), ROOT / "src", ROOT) if path)
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{n: str(v) for n, v in variables.items()}}


def started(*words: object, program: Sequence[object] = (sys.executable,), **variables: object) -> subprocess.Popen:
    """A process at the project's root, its output in pipes of text: `started("train.py", "--help")`."""
    command, pipe = [str(word) for word in (*program, *words)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(**variables), stdout=pipe, stderr=pipe, text=True)


def run_program(name: str, *words: object, timeout: float = 300, **variables: object) -> str:
    """What tests/support/programs/<name>.py writes to stdout; fails with its stderr if it fails."""
    process = started(PROGRAMS / f"{name}.py", *words, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-5000:]
    return out


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
