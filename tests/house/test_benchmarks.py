"""The commands of benchmarks/README.md start."""

import subprocess
import sys

from tests.support.source_files import ROOT


def test_every_benchmark_starts():
    """If this breaks, a command of benchmarks/README.md, or the table of tests/gpu.sh, ends with a traceback."""
    program = ROOT / "tests/support/programs/start_benchmarks.py"
    run = subprocess.run([sys.executable, program, ROOT / "benchmarks"], capture_output=True, text=True, timeout=240)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr
