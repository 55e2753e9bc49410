"""What a command inherits from a notebook, a batch system or an odd locale, and must not stumble over."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from rwkv_rlhf.host_cores import host_cores, odd_threads

DIGITS = 4  # of the width of a terminal
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how a thread waits for the others


def one_of_several() -> bool:
    """Whether a launcher (torchrun, srun) may have started other processes of this command."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


@contextmanager
def loading(library: str) -> Iterator[None]:
    """While `library` is imported the first time: what it makes lives as long as the process, so the collector of
    cycles leaves it alone, now, later and when the process ends (a fifth of the time of PyTorch's import and end)."""
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def take_over() -> None:
    """Called once, before anything else is imported.

    A notebook names a backend for its own plots, which matplotlib (Lightning imports it) refuses where the notebook's
    packages are missing. COLUMNS may be no width that a library could fill. A terminal or a pipe may have no byte for
    a character, and then shows its number. Threads that wait in a loop take the cores that the others wait for, as soon
    as another program is busy: unless told otherwise they sleep (dev/LOG.md has the times). A container that may use
    less than its machine's cores gets as many threads as it may use.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if "OMP_NUM_THREADS" not in os.environ and (share := container_share()):
        os.environ["OMP_NUM_THREADS"] = share
    os.environ["MPLBACKEND"] = "agg"
    width = os.environ.get("COLUMNS", "")
    if not (width.isdecimal() and 0 < len(width) <= DIGITS and int(width)):
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def thread_notice() -> str:
    """What is odd about the threads that the environment asks for; one process of several says it for all."""
    return "" if one_of_several() else odd_threads(os.environ.get("OMP_NUM_THREADS", ""), host_cores())


def container_share() -> str:
    """The cores of a container that may use less than its machine; "" for all."""
    cores = host_cores()
    return str(cores) if cores < (os.cpu_count() or 1) else ""


def threads_typed() -> bool:
    """Whether somebody asked for a number of threads."""
    return os.environ.get("OMP_NUM_THREADS", "") not in ("", container_share())
