"""Files opened for reading bytes, whether they are packed (gzip, Zstandard) or not: the first bytes tell."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rwkv_rlhf.files import LFS, check_readable, named_for_libraries, refuse_pointer

GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked as they are read.

    Raises ValueError for a file that is missing, damaged, a Git LFS pointer, or packed in a way that needs pyarrow
    where that is not installed.
    """
    check_readable(path)
    with open(path, "rb") as file:
        head = file.peek(len(LFS))
        refuse_pointer(path, head)
        stream: Any = file
        if head.startswith(GZIP):
            stream = gzip.GzipFile(fileobj=file)
        elif head.startswith(ZSTANDARD):
            stream = _zstandard(path)
        try:
            yield stream if stream is file else io.BufferedReader(stream, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a readable .gz file ({error})") from error
        except OSError as error:
            if stream is file:
                raise
            raise ValueError(f"{path}: cannot be unpacked ({error})") from error


def read_unpacked(path: str | os.PathLike[str]) -> bytes:
    """The whole file, unpacked; ValueError as `opened`."""
    with opened(path) as file:
        return file.read()


def pyarrow_for(path: str | os.PathLike[str]) -> Any:
    """The package pyarrow, without which `path` cannot be read; ValueError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    return pyarrow


def _zstandard(path: str | os.PathLike[str]) -> Any:
    with named_for_libraries(path) as name:
        return pyarrow_for(path).input_stream(os.fspath(name), compression="zstd")
