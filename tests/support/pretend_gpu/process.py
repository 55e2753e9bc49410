"""A process with a pretend GPU: what it has replaced in PyTorch cannot be taken back, so tests do not share it."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("device_guard.cpp")
PRELOAD = "LD_PRELOAD"


def device_guard() -> str:
    """Path of the compiled device guard. PyTorch looks for it while it is imported, so it must be loaded before."""
    import torch

    from rwkv_rlhf.ops import build

    folder = Path(torch.__file__).parent
    command, version = build.compiler()
    flags = ("-O0", "-std=c++20", "-fPIC", "-shared", f"-I{folder / 'include'}")
    links = (f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}")
    return str(build.binary(build.Recipe(SOURCE, (command, *flags), (version, torch.__version__), "pretend", links)))


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """Processes that are started inside the block have the device guard."""
    before = os.environ.get(PRELOAD)
    os.environ[PRELOAD] = device_guard()
    try:
        yield
    finally:
        del os.environ[PRELOAD]
        if before is not None:
            os.environ[PRELOAD] = before


def install() -> None:
    """Give this process, which has the device guard, a pretend GPU."""
    from rwkv_rlhf.reports import curves
    from tests.support.pretend_gpu import cuda_module, kernels

    os.environ.pop(PRELOAD, None)
    cuda_module.install()
    kernels.install()
    curves.draw_curves = lambda folder: None  # drawing takes longer than a run


def restarted(words: Sequence[str]) -> None:
    """Go on as the same program with the device guard, unless it is there."""
    if PRELOAD not in os.environ:
        with preloaded():
            os.execv(sys.executable, [sys.executable, *words])


class PretendProcess:
    """Runs functions of modules, one after the other, in one process that has a pretend GPU."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), install)
        with preloaded():
            self(os.getpid)  # which starts it

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives there; raises what it raises."""
        return self.pool.submit(function, *args).result(timeout=110)

    def close(self) -> None:
        """End the process."""
        self.pool.shutdown()
