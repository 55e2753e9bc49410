"""Files as this program treats them: written whole or not at all, read as UTF-8, never over their own input; and one
log that is only appended to, for work that goes on after a kill."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FULL = {errno.ENOSPC, errno.EDQUOT}
ENDS = 1 << 20  # bytes of the two ends of a file that its fingerprint begins with
BLOCK = 1 << 24  # bytes of a file that are hashed at once
LONGEST_HEAD = 1 << 20  # bytes of the first line of a log
SHARDS_INDEX = ".safetensors.index.json"  # the end of the name of a model in shards
MODEL_SUFFIXES = {"pth": ".pth", "safetensors": ".safetensors", "sharded": SHARDS_INDEX}  # by --save_format
TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")  # the names that `_temporary` gives, with the process
FINAL = "rwkv-final"  # how the names of what a run saves at its end begin
LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer of Git LFS begins


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    # the number of a process is unique on one machine only, and a folder may be shared by several
    return path.parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"


def is_left_behind(path: Path) -> bool:
    """Whether `path` is a temporary file or folder of this module whose process is not there any more."""
    found = TEMPORARY.fullmatch(path.name)
    if not found:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's process, a number that no process has
        pass
    return False


def _create(path: Path) -> Path:
    """A new empty file beside `path`, under a name that no other process uses."""
    temporary = _temporary(path)
    if path.is_dir():
        raise ValueError(f"{path}: cannot be written, it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    return temporary


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a temporary file that becomes `path` when the block ends well; otherwise `path` stays.

    The temporary file is empty and in the same folder (made if it does not exist). It is flushed to disk before it is
    renamed, and removed when the block raises. HDF5 tells of a full disk in words only, and those count too.

    Raises:
        ValueError: the folder cannot be written to, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary = _create(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in FULL or "No space left" in str(error):
            raise ValueError(f"{path}: the disk is full; the file was not written") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """As `atomic_path`, but gives the temporary file opened for writing bytes."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends well; otherwise nothing is left of it.

    It is in the same folder (made if it does not exist). The files in it should be flushed to disk by who writes them.

    Raises:
        ValueError: `path` exists and is not an empty folder, its place cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already; name a folder that does not exist, or an empty one")
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(f"{path}: the disk is full; the folder was not written") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the rename itself last; some file systems do not offer it, and then the rename is as good as it gets."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError at once when `path` could not be written later, so that no long work is lost at its end."""
    _create(Path(path)).unlink()


def refuse_same_file(source: str | os.PathLike[str], target: str | os.PathLike[str], flag: str) -> None:
    """Raises ValueError, naming `flag`, when `target` is the input file `source`."""
    same = os.path.realpath(source) == os.path.realpath(target)
    if not same and os.path.exists(source) and os.path.exists(target):
        same = os.path.samefile(source, target)
    if same:
        raise ValueError(f"{flag} {target} is the input file itself; give another name")


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises ValueError with one sentence when a file is missing, a folder, or not readable."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError with one sentence when a file is missing, a folder, or not readable."""
    with _reading(path), open(path, "rb"):
        return


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file; ValueError as `check_readable`."""
    with _reading(path):
        return Path(path).read_bytes()


def fingerprint(path: str | os.PathLike[str]) -> str:
    """What tells a file from another one: its size, the SHA-256 of its two ends, and that of all its blocks, in hex.

    PREFIX of a corpus stands for PREFIX.bin and PREFIX.idx; a name that is no file is its own fingerprint.
    Raises ValueError for a file that cannot be read.
    """
    name = os.fspath(path)
    found = []
    shards = sorted(Path(name).glob("*.safetensors")) if os.path.isdir(name) else []
    if name.endswith(SHARDS_INDEX) and os.path.isfile(name):
        shards = _named_shards(Path(name))
    for part in (*map(os.fspath, shards), name, f"{name}.bin", f"{name}.idx"):
        if not name or not os.path.isfile(part):
            continue
        with _reading(part), open(part, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
            whole = _blocks_hash(part, size)
        found.append(f"{size} bytes, {digest.hexdigest()[:16]}, {whole[:32]}")
    return "; ".join(found) or name


def _blocks_hash(path: str, size: int) -> str:
    """SHA-256 of the SHA-256s of a file's blocks, each read and hashed by one of the cores: a corpus may be large."""

    def block_hash(begin: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(begin)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(block_hash, range(0, size, BLOCK)))).hexdigest()


def same_fingerprint(one: str, two: str) -> bool:
    """Whether two fingerprints are of files of one content; those of older programs know the size and the ends only."""

    def fits(a: str, b: str) -> bool:
        return a == b or a.startswith(f"{b}, ") or b.startswith(f"{a}, ")

    parts = one.split("; "), two.split("; ")
    return len(parts[0]) == len(parts[1]) and all(map(fits, *parts))


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex; ValueError as `check_readable`.

    That of a model in shards is the SHA-256 of the hashes of its files, in the order of `sharded_files`.
    """
    if is_sharded(path):
        return hashlib.sha256("".join(map(_hash, sharded_files(path))).encode()).hexdigest()
    return _hash(path)


def _hash(path: str | os.PathLike[str]) -> str:
    with _reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a model in several safetensors files: the index of one, or a folder."""
    return os.fspath(path).endswith(SHARDS_INDEX) or os.path.isdir(path)


def bytes_of(path: str | os.PathLike[str]) -> int:
    """The size of a model's file, or of all its shards together."""
    return sum(os.path.getsize(file) for file in (sharded_files(path) if is_sharded(path) else [Path(path)]))


def sharded_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model in shards: its index and the shards that this names, or the one file of a folder.

    Raises ValueError for a folder without a model or with several, and for an index that names no files beside it.
    """
    path = Path(path)
    if not path.is_dir():
        return [path, *_named_shards(path)]
    found = [*path.glob(f"*{SHARDS_INDEX}")] or [*path.glob("*.safetensors")]
    if len(found) != 1:
        many = f"{len(found)} models ({', '.join(sorted(file.name for file in found)[:4])})" if found else "no model"
        raise ValueError(
            f"{path} is a folder with {many}: name a checkpoint file (.pth, .safetensors, {SHARDS_INDEX}), or a folder "
            "with one model in .safetensors"
        )
    return found if found[0].suffix == ".safetensors" else [*found, *_named_shards(found[0])]


def _named_shards(index: Path) -> list[Path]:
    named = read_json_object(index, "an index of safetensors").get("weight_map")
    files = list(named.values()) if isinstance(named, dict) else []
    plain = files and all(
        isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors") for name in files
    )
    if not plain:
        raise ValueError(f"{index} is not an index of safetensors (weight_map must name files beside it)")
    return [index.parent / name for name in sorted(set(files))]


class Framing(Protocol):
    """How one record of an `AppendLog` is told from the next."""

    def pack(self, record: bytes) -> bytes:
        """The bytes that stand in the file for a record."""

    def read(self, file: BinaryIO) -> bytes | None:
        """The next record; None where there is no whole one."""


class Lines:
    """A record is a line with its line break; if `quoted`, a break between quotation marks does not end it (CSV)."""

    def __init__(self, quoted: bool = False) -> None:
        self.quoted = quoted

    def pack(self, record: bytes) -> bytes:
        """The record itself, which ends with a line break."""
        return record

    def read(self, file: BinaryIO) -> bytes | None:
        """The next line; None for one that a kill cut off."""
        parts, inside = [], False
        while part := file.readline():
            parts.append(part)
            if self.quoted and part.count(b'"') % 2:
                inside = not inside
            if not inside:
                break
        record = b"".join(parts)
        return record if record.endswith(b"\n") and not inside else None


class Sized:
    """A record is any bytes behind a mark of four bytes, their number and their CRC-32."""

    def __init__(self, mark: bytes) -> None:
        self.mark, self.header = mark, struct.Struct("<4sQI")

    def pack(self, record: bytes) -> bytes:
        """Header and record."""
        return self.header.pack(self.mark, len(record), zlib.crc32(record)) + record

    def read(self, file: BinaryIO) -> bytes | None:
        """The next record; None for one that is cut off or damaged."""
        header = file.read(self.header.size)
        if len(header) < self.header.size:
            return None
        mark, size, checksum = self.header.unpack(header)
        if mark != self.mark or size > os.fstat(file.fileno()).st_size:  # no room is made for what cannot be there
            return None
        record = file.read(size)
        return record if len(record) == size and zlib.crc32(record) == checksum else None


class OtherHead(ValueError):
    """A log that belongs to other work: `head` is its first line."""

    def __init__(self, head: bytes) -> None:
        super().__init__(f"the log begins with {head!r}")
        self.head = head


class AppendLog:
    """A file that only grows, by whole records, so that a kill at any moment loses none that was finished.

    To go on with one: `resume` it (or `begin` it anew), read its `records`, `keep` those that are of use, `append`.

    Args:
        framing: how records are told apart. head: the first line, which says what the records belong to; b"" = none.
    """

    def __init__(self, path: str | os.PathLike[str], framing: Framing, head: bytes = b"") -> None:
        self.path, self.framing, self.head = Path(path), framing, head
        self._ends = [len(head)]  # where the head and each record that was read end

    def begin(self, record: bytes = b"") -> None:
        """Makes the file anew, with its head and perhaps a first record."""
        with atomic_write(self.path) as file:
            file.write(self.head + (self.framing.pack(record) if record else b""))
        self._ends = [len(self.head)]

    def resume(self) -> bool:
        """Whether there is a file to go on with. Raises OtherHead when it belongs to other work."""
        if not self.path.exists():
            return False
        with open(self.path, "rb") as file:
            found = file.readline(LONGEST_HEAD) if self.head else b""
        if found == self.head:
            return True
        if self.head.startswith(found):  # killed within the first line
            return False
        raise OtherHead(found)

    def records(self) -> Iterator[bytes]:
        """The records in order, up to the first that is cut off or damaged."""
        self._ends = [len(self.head)]
        with open(self.path, "rb") as file:
            file.seek(len(self.head))
            while (record := self.framing.read(file)) is not None:
                self._ends.append(file.tell())
                yield record

    def keep(self, count: int | None = None) -> int:
        """Cuts off what stands behind the first `count` records that were read (None = all); returns its bytes."""
        end = self._ends[-1 if count is None else count]
        cut = self.path.stat().st_size - end
        if cut:
            os.truncate(self.path, end)
        return cut

    def append(self, *records: bytes) -> None:
        """Adds records, which are on the disk when this returns. Raises ValueError when the disk is full."""
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(map(self.framing.pack, records)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in FULL:
                raise
            sentence = "the disk is full; free some space and start again to go on"
            raise ValueError(f"{self.path}: {sentence}") from error

    def remove(self) -> None:
        """Its work is done and stands elsewhere."""
        self.path.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. Raises ValueError for anything else, also for one nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def without_nan(value: Any) -> Any:
    """`value` with None for each number that JSON has no word for, in lists and objects too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def read_json_object(path: str | os.PathLike[str], what: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, "F is not `what` (why)", for anything else."""
    data = read_bytes(path)
    try:
        value = parse_json(data.decode())
    except ValueError as mistake:
        raise ValueError(f"{path} is not {what} ({mistake})") from mistake
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what} (it holds a {type(value).__name__})")
    return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON object, all or nothing. Raises ValueError when it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def named_for_libraries(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """A name of an existing file that libraries in other languages can open: many know names in UTF-8 only.

    Raises OSError as `open` does for a name that is not UTF-8.
    """
    if not any("\udc80" <= character <= "\udcff" for character in os.fspath(path)):
        yield path
        return
    with open(path, "rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def refuse_pointer(path: str | os.PathLike[str], head: bytes) -> None:
    """Raises ValueError where the first bytes of a file are those of a Git LFS pointer, the name of a file not here."""
    if head.startswith(LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull brings it")


def check_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file of torch.save is a zip archive. Raises ValueError for one that could unfold to more than it is.

    torch.save packs tensors and names uncompressed into a zip archive; a compressed record of a few bytes could become
    gigabytes in memory.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
            records = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: it begins like a checkpoint, but {error}") from error
    if records is None:
        raise ValueError(f"{path}: not a file written by torch.save, it is cut off ({size:,} bytes)")
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError(f"{path} was not written by torch.save: its records are compressed, or larger than the file")
    return True
