"""Compile a kernel on first use and load it: nothing is compiled or loaded at import.

`library` is for cuda/cpu/<name>.cpp; ops/gpu.py makes recipes of cuda/<name>.cu. A binary is kept under the user's
cache folder, in a folder named by a hash of everything it depends on (source, command and with it the instruction set
or architecture, torch, compiler), so one cache serves several machines and versions. It is compiled to a temporary name
and renamed, so nobody can load half a file. The lock only spares other processes the same work: the operating system
drops it when its owner dies, and one held for longer than `LOCK_PATIENCE` seconds is ignored.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

# of every kernel: inside an installed package, or the top level folder cuda/ of a clone
KERNELS = next(
    folder / "cuda" for folder in Path(__file__).resolve().parents[1:] if (folder / "cuda" / "device.h").is_file()
)
SOURCES = KERNELS / "cpu"
LOCK_PATIENCE = 300.0
# Vectors and fused multiply-adds, but none of the flags that let a compiler assume away NaN or infinity.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
ISA_FLAGS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}

T = TypeVar("T")
_loaded: dict[tuple, Any] = {}
_guard = threading.Lock()


class Recipe(NamedTuple):
    """How to make one binary."""

    source: Path
    headers: Sequence[Path]
    command: Sequence[str]  # compiler and flags; the source and -o follow
    links: Sequence[str]  # what follows these
    depends: Sequence[str]  # what else another binary is needed for: versions, the kind of machine
    label: str  # a word for the folder's name: the instruction set or architecture


class BuildError(RuntimeError):
    """A kernel could not be compiled or loaded; the text is the compiler's first error line."""


def library(name: str) -> Any:
    """Return `torch.ops.rwkv_<name>`, compiling cuda/cpu/<name>.cpp first if no cached binary fits.

    Raises BuildError (again on every call: a failed build is not retried within a process).
    """

    def make() -> Any:
        load(_host_recipe(name), torch.ops.load_library)
        return getattr(torch.ops, f"rwkv_{name}")

    return once((name, SOURCES), make)


def once(key: tuple, make: Callable[[], T]) -> T:
    """The result of `make`, which is called once per process and key; a BuildError is a result too, raised again."""
    with _guard:
        if key not in _loaded:
            try:
                _loaded[key] = make()
            except BuildError as error:
                _loaded[key] = error
    found = _loaded[key]
    if isinstance(found, BuildError):
        raise found
    return found


def load(recipe: Recipe, open_library: Callable[[str], T]) -> T:
    """Open the binary of a recipe; one from the cache that does not open (damaged, say) is rebuilt once.

    `open_library` takes a path and raises OSError. Raises BuildError.
    """
    path = binary(recipe)
    try:
        return open_library(str(path))
    except OSError:
        path.unlink(missing_ok=True)
    try:
        return open_library(str(binary(recipe)))
    except OSError as error:
        raise BuildError(f"{recipe.source.name}: {error}") from error


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
        if re.search(r"\berror\b|\bfatal\b|undefined reference|not found|cannot find", line, re.IGNORECASE):
            return line
    return lines[0] if lines else "the compiler failed without a message"


def binary(recipe: Recipe) -> Path:
    """Path of the compiled library, compiled now unless a process with the same hash did so before."""
    source = recipe.source
    if not source.is_file():
        raise BuildError(f"no source file {source}")
    digest = hashlib.sha256("\0".join((*recipe.command, *recipe.depends)).encode())
    for path in (source, *recipe.headers):
        digest.update(path.read_bytes())
    folder = cache_folder() / f"{source.stem}-{recipe.label}-{digest.hexdigest()[:16]}"
    target = folder / f"rwkv_{source.stem}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(exist_ok=True)
        with _lock(folder / "lock"):
            if not target.is_file():
                _compile(recipe, target)
    except OSError as error:  # a full or vanished disk
        raise BuildError(f"{source.name}: {error}") from error
    return target


def _host_recipe(name: str) -> Recipe:
    """The recipe of cuda/cpu/<name>.cpp for this machine's instruction set."""
    command, version = compiler()
    isa = instruction_set()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    links = [part for path in cpp_extension.library_paths("cpu") for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return Recipe(
        source=SOURCES / f"{name}.cpp",
        headers=sorted(SOURCES.glob("*.h")),
        command=(command, *FLAGS, *ISA_FLAGS.get(isa, ()), "-shared", abi, *includes),
        links=(*links, "-lc10", "-ltorch_cpu"),
        depends=(version, torch.__version__, platform.machine()),
        label=isa.lower(),
    )


def _compile(recipe: Recipe, target: Path) -> None:
    """Compile and link a recipe's source, then give the result its final name in one step."""
    began = time.monotonic()
    source = recipe.source
    logger.info("compiling %s (once; about 15 s)", source.name)
    name = f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}"  # machines may share a cache
    partial = target.with_name(name)
    line = [*recipe.command, str(source), "-o", str(partial), *recipe.links]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(first_error(done.stderr + done.stdout))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("compiled %s in %.0f s", source.name, time.monotonic() - began)


def held(path: Path) -> bool:
    """Whether another process compiles under this lock now; a lock file alone says nothing, its owner may be dead."""
    import fcntl  # absent on Windows, where compiler() has already refused

    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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
