"""Memory of a CPU run: give freed pages back to the system while loading, keep them while training.

glibc returns every block above 32 MiB to the kernel when it is freed, and the next step's weights, gradients and logits
come back page by page, zeroed. Measured on two cores: zeroing 200 MiB takes 125 ms that way and 6 ms in pages that were
kept (dev/LOG.md).

While a model is loaded it is the other way round: what is dense for a moment leaves holes between the packed matrices
that stay, and the heap grows to two or three times the model. Blocks of pages of their own leave none. So do tensors
that live through a whole step while everything around them comes and goes (`own_pages`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# the parameters of mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
NEVER = (1 << 31) - 1
OWN_PAGES = 1 << 17  # bytes of a block that gets pages of its own while loading
MOST_BLOCKS = 1 << 16  # of them, as glibc counts before anything is set


LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def host_bytes() -> int:
    """Bytes of memory that this machine has, or that its container may use; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    except OSError:
        return 0
    for path in LIMITS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return min(found, default=0)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def keep_pages() -> bool:
    """Let glibc serve every size from its heap and never shrink it; False where the C library is another one."""
    library = _glibc()
    return bool(library and library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, NEVER))


def return_pages() -> bool:
    """Let glibc give every larger block back when it is freed, for loading; False where the C library is another."""
    library = _glibc()
    return bool(library and library.mallopt(M_MMAP_MAX, MOST_BLOCKS) and library.mallopt(M_MMAP_THRESHOLD, OWN_PAGES))


def own_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of `shape` on the host, outside of the heap: pages come when they are written and go with the tensor."""
    pages = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype)[: math.prod(shape)].view(*shape)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
