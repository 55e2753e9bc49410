"""Files as this program treats them: written whole or not at all, read as UTF-8, never over their own input."""

import errno
import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FULL = {errno.ENOSPC, errno.EDQUOT}


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """Opens a new file beside `path`, under a name that no other process uses."""
    # the number of a process is unique on one machine only, and a folder may be shared by several
    temporary = path.parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    if path.is_dir():
        raise ValueError(f"{path}: cannot be written, it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return temporary, open(temporary, "wb")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Gives a binary file that becomes `path` when the block ends well; otherwise `path` stays as it was.

    The bytes go to a temporary file in the same folder (made if it does not exist), are flushed to disk, and renamed.
    When the block raises, the temporary file is removed.

    Raises:
        ValueError: the folder cannot be written to, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(f"{path}: the disk is full; the file was not written") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_write`, for libraries that open a file by its name: gives the temporary name to write to.

    Raises ValueError as `atomic_write`; HDF5 tells of a full disk in words only, and those count too.
    """
    path = Path(path)
    temporary, file = _create(path)
    file.close()
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
    temporary, file = _create(Path(path))
    file.close()
    temporary.unlink()


def refuse_same_file(source: str | os.PathLike[str], target: str | os.PathLike[str], flag: str) -> None:
    """Raises ValueError, naming `flag`, when `target` is the input file `source`."""
    same = os.path.realpath(source) == os.path.realpath(target)
    if not same and os.path.exists(source) and os.path.exists(target):
        same = os.path.samefile(source, target)
    if same:
        raise ValueError(f"{flag} {target} is the input file itself; give another name")


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError with one sentence when a file is missing, a folder, or not readable."""
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file; ValueError with one sentence when it is missing, a folder, or not readable."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def fingerprint(path: str | os.PathLike[str], length: int = 1 << 20) -> str:
    """What tells two files apart without reading them: the size, and the SHA-256 of both ends, in hex."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(file.read(length))
            file.seek(max(0, size - length))
            digest.update(file.read(length))
            return f"{size} bytes, {digest.hexdigest()[:16]}"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. Raises ValueError for anything else, also for one nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
            file.write((json.dumps(value, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


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
