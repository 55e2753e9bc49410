"""Whether torch.compile, or Triton, has what it makes code with on this machine. Asking imports neither."""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from rwkv_rlhf.ops.build import machine_variable

OLDEST_GPU = 7, 0  # compute capability, for PyTorch's code generator


def refusal(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for `device`; None if it can."""
    if sys.platform == "win32":
        return "torch.compile wants the compilers of Linux or macOS, and this is Windows (WSL has them)"
    if device.type == "cpu":
        command = machine_variable("CXX") or "g++"
        if shutil.which(command) is None:
            return f"torch.compile needs a C++ compiler on a CPU, and '{command}' was not found (install it or set CXX)"
        return None
    if device.type != "cuda":
        return f"torch.compile was not tried on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU (pip install triton; it comes with PyTorch for Linux)"
    if lacking := no_starter():
        return lacking
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "torch.compile makes no code for a GPU below compute capability 7.0"
    return None


def no_starter() -> str | None:
    """Why Triton cannot build the small C file by which Python starts its kernels on a GPU; None if it can."""
    command = machine_variable("CC") or "gcc"
    if not any(shutil.which(name) for name in (command, "clang")):
        return f"Triton needs a C compiler to start kernels, and '{command}' was not found (install it or set CC)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python's C headers to start kernels, and Python.h was not found (on Debian: python3-dev)"
    return None
