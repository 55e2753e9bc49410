"""Compile kernels on first use and keep the binaries: nothing is compiled or loaded at import, nothing needs torch.

ops/cpu.py and ops/gpu.py say what to compile. A binary is kept under the
user's cache folder, in a folder named by a hash of everything it depends on (sources, flags and with them the
instruction set or architecture, compiler, machine), so one cache serves every clone, environment and version of torch.
It is compiled to a temporary name and renamed, so nobody can load half a file. The lock only spares other processes the
same work: the operating system drops it when its owner dies, and one held for longer than `LOCK_PATIENCE` is ignored.
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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)

# of every kernel: inside an installed package, or the top level folder cuda/ of a clone
KERNELS = next(
    folder / "cuda" for folder in Path(__file__).resolve().parents[1:] if (folder / "cuda" / "device.h").is_file()
)
SOURCES = KERNELS / "cpu"
PACKAGED = KERNELS / "built"  # binaries that a wheel brought (setup.py makes them); a clone has none
LOCK_PATIENCE = 300.0  # seconds
# Vectors and fused multiply-adds, but none of the flags that let a compiler assume away NaN or infinity. No OpenMP
# library is linked: cuda/cpu/threads.h finds the one that torch has loaded.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# the instruction sets that CPU kernels are compiled for, the widest first
ISA_FLAGS = {
    "AMX": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
    "DEFAULT": (),
}

T = TypeVar("T")


class Recipe(NamedTuple):
    """How to make one binary."""

    source: Path
    command: Sequence[str]  # compiler and flags; the source, -o and `links` follow
    depends: Sequence[str]  # what else another binary is needed for: the compiler's version, the kind of machine
    label: str  # a word for the folder's name: the instruction set or architecture
    links: Sequence[str] = ()


class BuildError(RuntimeError):
    """A kernel could not be compiled or loaded; the text is the compiler's first error line."""


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


def binary(recipe: Recipe) -> Path:
    """Path of the compiled library, compiled now unless a process with the same hash did so before.

    Raises BuildError.
    """
    (found,) = binaries([recipe])
    if isinstance(found, BuildError):
        raise found
    return found


def binaries(recipes: Sequence[Recipe]) -> list[Path | BuildError]:
    """`binary` for several recipes: missing ones are compiled side by side, as many at a time as there are cores."""
    found = [_target(recipe) for recipe in recipes]
    missing = [
        (recipe, target) for recipe, target in zip(recipes, found) if isinstance(target, Path) and not target.is_file()
    ]
    if not missing:
        return found
    names = ", ".join(f"{recipe.source.stem} ({recipe.label})" for recipe, _ in missing)
    count = f"{len(missing)} kernel{'s' * (len(missing) > 1)}"
    logger.info("compiling %s, once for this machine and compiler: %s", count, names)
    began = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        failures = dict(zip((target for _, target in missing), pool.map(lambda pair: _build(*pair), missing)))
    if not any(failures.values()):
        logger.info("compiled %s in %.1f s", count, time.monotonic() - began)
    return [target if isinstance(target, BuildError) else failures.get(target) or target for target in found]


def host_recipe(name: str, isa: str, head_size: int = 0) -> Recipe:
    """How cuda/cpu/<name>.cpp is compiled for an instruction set of `ISA_FLAGS` and one head size (0: for all).

    Raises BuildError without a compiler.
    """
    command, version = compiler()
    isa = set_used(name, isa)
    flags = (*FLAGS, *ISA_FLAGS[isa], *head_size_flags(head_size))
    label = isa.lower() + f"-n{head_size}" * bool(head_size)
    return Recipe(SOURCES / f"{name}.cpp", (command, *flags), (version, platform.machine()), label)


def head_size_flags(head_size: int) -> tuple[str, ...]:
    """Leave out the other head sizes: two thirds of the work. 0: leave out none."""
    return (f"-DRWKV_HEAD_SIZE={head_size}",) if head_size else ()


def host_kernels() -> list[str]:
    """The names of cuda/cpu/<name>.cpp."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def instruction_sets() -> list[str]:
    """Those of `ISA_FLAGS` that this kind of machine can be compiled for, the widest first."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["DEFAULT"]


def set_used(name: str, isa: str) -> str:
    """The instruction set that cuda/cpu/<name>.cpp is compiled for: most kernels have nothing for the matrix unit."""
    source = SOURCES / f"{name}.cpp"
    if isa != "AMX" or not source.is_file():
        return isa
    return isa if any("__AMX_" in path.read_text(encoding="utf-8") for path in included(source)) else "AVX512"


def host_binaries() -> dict[Path, Path]:
    """Every CPU kernel for every instruction set, compiled: where a wheel keeps it -> where it lies now.

    Raises BuildError without a compiler, or if one of them cannot be compiled.
    """
    kinds = list(dict.fromkeys((name, set_used(name, isa)) for isa in instruction_sets() for name in host_kernels()))
    found = {}
    for kind, binary in zip(kinds, binaries([host_recipe(*kind) for kind in kinds])):
        if isinstance(binary, BuildError):
            raise binary
        found[packaged_path(*kind)] = binary
    return found


def packaged(name: str, isa: str) -> Path | None:
    """The binary of cuda/cpu/<name>.cpp that a wheel brought for this kind of machine, for `isa` or a narrower set."""
    sets = list(ISA_FLAGS)
    paths = (packaged_path(name, other) for other in sets[sets.index(isa) :])
    return next((path for path in paths if path.is_file()), None)


def packaged_path(name: str, isa: str) -> Path:
    """Where a wheel has the binary of cuda/cpu/<name>.cpp for an instruction set."""
    return PACKAGED / f"{platform.machine()}-{set_used(name, isa).lower()}" / f"rwkv_{name}.so"


def compiler() -> tuple[str, str]:
    """The C++ compiler ($CXX or c++) and its version line. Raises BuildError if there is none."""
    if platform.system() == "Windows":
        raise BuildError("the kernels are written for GCC and clang, which PyTorch does not use on Windows")
    command = machine_variable("CXX") or "c++"
    if shutil.which(command) is None:
        raise BuildError(f"no C++ compiler: '{command}' was not found (install g++ or clang++, or set CXX)")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    return command, done.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """Where binaries are kept: rwkv-rlhf/kernels in the user's cache folder, or, where that cannot be written or there
    is no home, a private folder for temporary files. Raises BuildError."""
    home = Path(machine_variable("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    root = home / "rwkv-rlhf" / "kernels"
    if home.is_absolute():  # "~" stays what it is where nobody has a home
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK):
                return root
    fallback = Path(tempfile.gettempdir()) / f"rwkv-rlhf-kernels-{os.getuid()}"
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


def included(source: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """`source` and all that it includes with quotes, also indirectly, from its own folder or from `folders`."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            waiting += [(folder / name).resolve() for folder in (path.parent, *folders) if (folder / name).is_file()][
                :1
            ]
    return [source, *sorted(found[1:])]


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


def machine_variable(name: str) -> str | None:
    """What the machine, not the run, is set up with: a compiler, a cache folder."""
    value = os.path.expandvars(f"${name}")
    return None if value in ("", f"${name}") else value


def _target(recipe: Recipe) -> Path | BuildError:
    """Where the binary of a recipe belongs, or why it cannot be had."""
    source = recipe.source
    if not source.is_file():
        return BuildError(f"no source file {source}")
    # where headers lie is left out, as what they say is in: another clone has the same binary
    words = [word for word in recipe.command if not word.startswith("-I")]
    folders = [Path(word[2:]) for word in recipe.command if word.startswith("-I")]
    digest = hashlib.sha256("\0".join((*words, *recipe.links, *recipe.depends)).encode())
    for path in included(source, folders):
        digest.update(path.read_bytes())
    try:
        folder = cache_folder() / f"{source.stem}-{recipe.label}-{digest.hexdigest()[:16]}"
    except BuildError as error:
        return error
    return folder / f"rwkv_{source.stem}.so"


def _build(recipe: Recipe, target: Path) -> BuildError | None:
    """Compile a recipe to its place, unless another process does so first; None, or why it failed."""
    try:
        target.parent.mkdir(exist_ok=True)
        with _lock(target.parent / "lock"):
            if not target.is_file():
                _compile(recipe, target)
    except BuildError as error:
        return error
    except OSError as error:  # a full or vanished disk
        return BuildError(f"{recipe.source.name}: {error}")
    return None


def _compile(recipe: Recipe, target: Path) -> None:
    """Compile and link a recipe's source, then give the result its final name in one step."""
    name = f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}"  # machines may share a cache
    partial = target.with_name(name)
    line = [*recipe.command, str(recipe.source), "-o", str(partial), *recipe.links]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(first_error(done.stderr + done.stdout))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


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
