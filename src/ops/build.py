"""Compile cuda/cpu/<name>.cpp on first use and load it: nothing is compiled or loaded at import.

A binary is kept under the user's cache folder, in a folder named by a hash of everything it depends on (source, flags
and with them the instruction set, torch, compiler), so one cache serves several machines and versions. It is compiled
to a temporary name and renamed, so nobody can load half a file. The lock only spares other processes the same work:
the operating system drops it when its owner dies, and one held for longer than `LOCK_PATIENCE` seconds is ignored.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parents[2] / "cuda" / "cpu"
LOCK_PATIENCE = 300.0
# Vectors and fused multiply-adds, but none of the flags that let a compiler assume away NaN or infinity.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
ISA_FLAGS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}

_loaded: dict[tuple[str, Path], Any] = {}
_guard = threading.Lock()


class BuildError(RuntimeError):
    """A kernel could not be compiled or loaded; the text is the compiler's first error line."""


def library(name: str) -> Any:
    """Return `torch.ops.rwkv_<name>`, compiling cuda/cpu/<name>.cpp first if no cached binary fits.

    Raises BuildError (again on every call: a failed build is not retried within a process).
    """
    key = (name, SOURCES)
    with _guard:
        if key not in _loaded:
            try:
                _load(name)
                _loaded[key] = getattr(torch.ops, f"rwkv_{name}")
            except BuildError as error:
                _loaded[key] = error
    found = _loaded[key]
    if isinstance(found, BuildError):
        raise found
    return found


def instruction_set() -> str:
    """The widest vector instruction set this machine and torch agree on: AVX512, AVX2 or DEFAULT."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "DEFAULT"
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in ISA_FLAGS else "DEFAULT"


def compiler() -> tuple[str, str]:
    """The C++ compiler ($CXX or c++) and its version line. Raises BuildError if there is none."""
    command = cpp_extension.get_cxx_compiler()
    if platform.system() == "Windows":
        raise BuildError("the kernels are written for GCC or clang, which torch does not use on Windows")
    if shutil.which(command) is None:
        raise BuildError(f"no C++ compiler: '{command}' was not found (install g++ or clang++, or set CXX)")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    return command, done.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """Where binaries are kept: torch's own folder for extensions, or a private temporary one if that is read-only."""
    root = Path(cpp_extension.get_default_build_root()) / "rwkv_ops"
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    fallback = Path(tempfile.gettempdir()) / f"rwkv_ops_{os.getuid()}"
    try:
        fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"neither {root} nor {fallback} can be written: {error}") from error
    if fallback.stat().st_uid != os.getuid():  # someone else's folder could hold someone else's code
        raise BuildError(f"neither {root} can be written nor is {fallback} ours")
    return fallback


def first_error(output: str) -> str:
    """The first line of a compiler's output that states an error, else the first line that says anything."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\berror\b|undefined reference|not found|cannot find", line, re.IGNORECASE):
            return line
    return lines[0] if lines else "the compiler failed without a message"


def _binary(name: str) -> Path:
    """Path of the compiled library, compiled now unless a process with the same hash did so before."""
    source = SOURCES / f"{name}.cpp"
    if not source.is_file():
        raise BuildError(f"no source file {source}")
    command, version = compiler()
    flags = (*FLAGS, *ISA_FLAGS.get(instruction_set(), ()))
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))
    parts = (command, version, " ".join(flags), torch.__version__, platform.machine())
    digest = hashlib.sha256("\0".join(parts).encode() + source.read_bytes() + headers).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{instruction_set().lower()}-{digest}"
    target = folder / f"rwkv_{name}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(exist_ok=True)
        with _lock(folder / "lock"):
            if not target.is_file():
                _compile(command, flags, source, target)
    except OSError as error:  # a full or vanished disk
        raise BuildError(f"{name}: {error}") from error
    return target


def _compile(command: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile and link `source`, then give the result its final name in one step."""
    began = time.monotonic()
    logger.info("compiling %s (once; about 15 s)", source.name)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    links = [part for path in cpp_extension.library_paths("cpu") for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    line = [command, *flags, abi, *includes, str(source), "-shared", "-o", str(partial), *links, "-lc10", "-ltorch_cpu"]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(first_error(done.stderr + done.stdout))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("compiled %s in %.0f s", source.name, time.monotonic() - began)


def _load(name: str) -> None:
    """Load the library; a cached one that does not load (damaged, or its libraries are gone) is rebuilt once."""
    for attempt in (1, 2):
        binary = _binary(name)
        try:
            torch.ops.load_library(str(binary))
            return
        except OSError as error:
            binary.unlink(missing_ok=True)
            if attempt == 2:
                raise BuildError(f"{name}: {error}") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` locked; goes on without it after LOCK_PATIENCE seconds, or where the file system has no locks."""
    import fcntl  # absent on Windows, where compiler() has already refused

    with open(path, "w") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.warning("the lock %s is held for %.0f s; compiling without it", path, LOCK_PATIENCE)
                    break
                time.sleep(0.05)
            except OSError:  # for example a network drive without a lock service
                break
        yield
