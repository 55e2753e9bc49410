"""Reads damaged and hostile files with every reader of the program: python tests/fuzz.py --count 20000 --seed 1

An input is a whole sample with one to four changes, drawn from its reader's name and its number alone, now and then
in a folder with an odd name. Others are made up: what every writer is given and must read back, odd numbers behind
every flag, odd variables of the environment. Each is read in a worker process, so that a crash or endless loop is
seen and named. Allowed are a value, and a ValueError of one sentence that names the file. Any other exception, a
crash, more time or memory than an input may cost, a changed or a new file, and anything run or connected to on the
file's behalf is a defect. Printed for each: how to run it again, and with --keep DIR the files themselves.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.settings.command_line import one_line
from tests.fuzzing.mutators import BYTES, LONGEST, SENTINEL
from tests.fuzzing.readers import READERS, Reader

SECONDS = 30  # that one input may take, on a busy machine
MEMORY = 256 << 20  # bytes that reading an input of at most LONGEST bytes may add to the worker
CEILING = 4 << 30  # of address space beyond what the worker began with: spares the machine, and shows as MemoryError
SENTENCE = 1100  # characters
ODD = 0.15  # of the inputs lie in a folder of FOLDERS
FOLDERS = (
    *(
        "caf\udce9",
        "a\nb",
        " a ",
        "-x",
        "%s%n",
        "{load_model}",
        "a,b",
        "x:2",
        "[a]*?",
        "\u732b",
        "a'b\"c",
        "\x1b[2J",
        "a.gz",
    ),
    *("a\\b", "~", "$HOME", "#", "a" * 200, "\u202e", ".hidden", "x.h5", "con"),
)
TOGETHER = 100  # inputs of a worker
# what a data file must never cause; "open" for writing is seen by looking at the folder
FORBIDDEN = re.compile(r"os\.(system|exec|posix_spawn|spawn|fork)|subprocess\.Popen|socket\.")
TEMPLATES = "jinja_process"  # the program's own process that runs templates
Sample = dict[str, bytes]


@dataclass
class Defect:
    """What went wrong, with which input."""

    reader: str
    number: int
    what: str

    def __str__(self) -> str:
        again = f"python tests/fuzz.py --reader {self.reader!r} --first {self.number} --count 1 --keep found"
        return f"{self.reader} input {self.number}: {self.what}\n  again: {again}"


@dataclass
class Result:
    """Counts by reader: values and refusals; and the defects."""

    read: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    defects: list[Defect] = field(default_factory=list)
    slowest: tuple[float, str, int] = (0.0, "", 0)


def sample(reader: Reader) -> tuple[Sample, str]:
    """(file name -> bytes, the path that is read) of a whole sample."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = reader.write(folder)
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        return files, str(path.relative_to(folder))


def mutated(reader: Reader, files: Sample, rng: Random, whole: bool = False) -> Sample:
    """The sample with one to four changes, unless it is to stay whole; now and then a file is missing."""
    files = dict(files)
    if whole or reader.made:
        return files
    names = [name for name in files if "base" not in name]
    count = rng.choice((1, 1, 1, 2, 4))
    ways = [rng.choice(reader.mutators if reader.mutators and rng.random() < 0.5 else BYTES) for _ in range(count)]
    for way in sorted(ways, key=BYTES.__contains__):  # those that need a whole file come first
        name = rng.choice(names)
        if len(names) > 1 and rng.random() < 0.02:
            files.pop(name, None)
        changed = way(files[name], rng) if name in files else None
        if changed is not None:
            files[name] = changed[:LONGEST]
    return files


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unlawful(error: BaseException, names: Sequence[str]) -> str:
    """Why an exception is not what a user may meet; "" when it is."""
    if not isinstance(error, ValueError):
        return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"asked for more memory than there is: {error}"
        cause = cause.__cause__ or cause.__context__
    text = one_line(str(error))
    if not any(name in text for name in names):
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return f"a {type(error).__name__} that does not name the file: {text[:SENTENCE]}\n{where}"
    if len(text) > SENTENCE:
        return f"a sentence of {len(text)} characters: {text[:SENTENCE]}"
    return ""


def peak(reset: bool = False) -> int:
    """Largest resident size of this process in bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10


def one(name: str, files: Sample, target: str, number: int, events: list[str]) -> tuple[bool, str]:
    """(whether there was a value, what is wrong or "") of one input, read in the working folder."""
    reader, rng = READERS[name], Random(f"{name} {number}")
    folder = Path.cwd()
    if number >= 0 and Random(f"folder {name} {number}").random() < ODD:
        folder = folder / Random(f"folder {number}").choice(FOLDERS)
        folder.mkdir()
    for file, data in mutated(reader, files, rng, whole=number < 0).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    path = folder / target
    # a path with a comma that is not there is a list of paths, and a sentence names the first of them
    names = [str(path), str(path).split(",")[0], path.name, *(Path(file).name for file in files), *reader.says]
    before, start = contents(folder), peak(reset=True)
    events.clear()
    wrong = ""
    try:
        reader.read(path, rng)
        value = True
    except BaseException as error:  # a panic of a library in Rust is no Exception
        value, wrong = False, unlawful(error, names)
    grown = peak() - start
    seen = list(events)
    after = contents(folder)
    if not wrong and grown > MEMORY:
        wrong = f"took {grown >> 20} MiB"
    if not wrong and (folder / SENTINEL).exists():
        wrong = "code of the file was run"
    if not wrong and seen:
        wrong = f"the file made the program call {seen[0]}"
    new = {file for file in after if not file.startswith("written")} - set(before)
    lost = [file for file in before if after.get(file) != before[file]]
    if not wrong and (new or lost) and not reader.repairs:
        wrong = f"changed {', '.join(sorted([*new, *lost]))}"
    return value, wrong


def work(name: str, files: Sample, target: str, numbers: Sequence[int], pipe: int) -> None:
    """What a worker does: reads the inputs one after the other and says so on `pipe`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setpgid(0, 0)
    torch.set_num_threads(1)  # the parent's OpenMP threads are not in a fork, and libgomp would wait for them for ever
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + CEILING,) * 2)
    faulthandler.disable()  # a crash is reported by its status
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    events: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if FORBIDDEN.match(event) and TEMPLATES not in str(arguments):
            events.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        for number in numbers:
            folder = Path(place) / str(number)
            folder.mkdir()
            os.chdir(folder)
            os.write(pipe, json.dumps(("begins", number, False, "")).encode() + b"\n")
            try:
                value, wrong = one(name, files, target, number, events)
            except Exception:
                value, wrong = False, f"the mutators failed: {traceback.format_exc()}"
            os.write(pipe, json.dumps(("ends", number, value, wrong[:3000])).encode() + b"\n")
            os.chdir(place)
            shutil.rmtree(folder)


def reports(pipe: int, child: int) -> Iterator[tuple[str, int, bool, str]]:
    """What a worker says; ends when it has nothing more to say, with `silent` when it took too long."""
    buffer = b""
    while True:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.killpg(child, signal.SIGKILL)
            yield "silent", 0, False, ""
            return
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *whole, buffer = (buffer + data).split(b"\n")
        yield from map(json.loads, whole)


def batch(name: str, numbers: Sequence[int], result: Result, whole: tuple[Sample, str]) -> None:
    """Reads some inputs in a worker, and the rest in another one when it does not survive one of them."""
    waiting = list(numbers)
    while waiting:
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(source)
                work(name, *whole, waiting, sink)
                status = 0
            finally:
                os._exit(status)
        os.close(sink)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)  # both sides do it: whoever comes first
        at, began, slow = waiting[0], time.monotonic(), False
        for word, number, value, wrong in reports(source, child):
            slow = word == "silent"
            if word == "begins":
                at, began = number, time.monotonic()
            elif word == "ends":
                waiting.remove(number)
                (result.read if value else result.refused)[name] += not wrong
                if wrong:
                    result.defects.append(Defect(name, number, wrong))
                result.slowest = max(result.slowest, (time.monotonic() - began, name, number))
        os.close(source)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if slow or status:
            how = f"took more than {SECONDS} s" if slow else f"ended the process with status {status}"
            result.defects.append(Defect(name, at, how))
            waiting = [number for number in waiting if number > at]


def fuzz(names: Sequence[str], count: int, first: int, told: bool = False) -> Result:
    """Reads `count` inputs, the same number of each reader, beginning with number `first`."""
    result = Result()
    each = -(-count // len(names))
    for name in names:
        whole = sample(READERS[name])
        for begin in range(first, first + each, TOGETHER):
            seen = len(result.defects)
            batch(name, range(begin, min(begin + TOGETHER, first + each)), result, whole)
            for defect in result.defects[seen:] if told else ():
                sys.stdout.write(f"{defect}\n")
                sys.stdout.flush()
    return result


def keep(name: str, number: int, folder: Path) -> None:
    """Writes the files of one input, to look at."""
    files, _ = sample(READERS[name])
    for file, data in mutated(READERS[name], files, Random(f"{name} {number}")).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Read damaged and hostile files with every reader.")
    parser.add_argument("--count", type=int, default=20000, help="inputs in all [20000]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs [0]")
    parser.add_argument("--first", type=int, help="number of the first input, instead of --seed")
    parser.add_argument("--reader", action="append", choices=READERS, help="only this one (may be repeated)")
    parser.add_argument("--keep", type=Path, help="write the first input of each reader into this folder")
    args = parser.parse_args(words)
    names = args.reader or list(READERS)
    first = args.seed * 1_000_000 if args.first is None else args.first
    for name in names if args.keep else ():
        keep(name, first, args.keep / name)
    began = time.monotonic()
    result = fuzz(names, args.count, first, told=True)
    for name in names:
        print(f"{name:32} {result.read[name]:6} read {result.refused[name]:6} refused")
    seconds, name, number = result.slowest
    good = sum(result.read.values()) + sum(result.refused.values())
    print(f"{good} inputs as they should, {len(result.defects)} defects")
    print(f"{time.monotonic() - began:.0f} s, the slowest {seconds:.1f} s ({name} input {number})")
    return 1 if result.defects else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
