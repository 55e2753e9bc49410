"""Starts every benchmark with --help, as on the command line, and prints what fails.

Each in a fork of this process, which has imported what takes seconds; none sees what another put on sys.path.
"""

import contextlib
import io
import os
import runpy
import sys
import traceback
from pathlib import Path

import pytorch_lightning  # noqa: F401
import torch  # noqa: F401


def started(script: Path) -> bool:
    """Whether the script printed its help and nothing else happened."""
    sys.argv = [str(script), "--help"]
    sys.path[0] = str(script.parent)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return not end.code and "usage:" in said.getvalue()
    except Exception:
        traceback.print_exc()
    return False


for script in sorted(Path(sys.argv[1]).glob("*.py")):
    if "__main__" not in script.read_text(encoding="utf-8"):
        continue  # what others import
    child = os.fork()
    if not child:
        os._exit(not started(script))
    if os.waitpid(child, 0)[1]:
        print(script.name)
