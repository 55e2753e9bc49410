"""How many cores a process may use, and whether the number of threads that somebody asked for fits them."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def host_cores(group: Path = GROUP) -> int:
    """Cores that this process may use, at least 1: those it is bound to, and no more than its container's share.

    group: where Linux shows the control group, in its second form (cpu.max) or its first (cpu/cpu.cfs_quota_us).
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _share(group))))


@functools.cache  # a start asks several times
def _share(group: Path) -> float:
    """Cores by the time that the control group may take; infinite without a limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / "cpu" / f"cpu.cfs_{word}_us").read_text() for word in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return math.inf
    return share if share > 0 else math.inf  # the first form says -1


def odd_threads(asked: str, cores: int) -> str:
    """What is odd about OMP_NUM_THREADS; "" if nothing is."""
    if asked and not (asked.isdecimal() and int(asked)):
        return f"OMP_NUM_THREADS={asked} is no number of threads: PyTorch takes one for each core"
    if asked and int(asked) > cores:
        return f"OMP_NUM_THREADS={asked} on {cores} cores: threads wait for each other; leave it unset"
    return ""
