"""What a command inherits from a notebook, a batch system or an odd locale, and must not stumble over."""

import os
import sys
from io import TextIOWrapper

DIGITS = 4  # of the width of a terminal


def one_of_several() -> bool:
    """Whether a launcher (torchrun, srun) may have started other processes of this command."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def take_over() -> None:
    """Called once, before anything else is imported.

    A notebook names a backend for its own plots, which matplotlib (Lightning imports it) refuses where the notebook's
    packages are missing. COLUMNS may be no width that a library could fill. A terminal or a pipe may have no byte for
    a character, and then shows its number.
    """
    os.environ["MPLBACKEND"] = "agg"
    width = os.environ.get("COLUMNS", "")
    if not (width.isdecimal() and 0 < len(width) <= DIGITS and int(width)):
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
