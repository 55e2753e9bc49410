"""What is looked at in a foreign HDF5 file before the library reads its lists of variable length.

The library believes what a file says: it makes room for as many numbers as an entry claims to have, and follows a chain
of objects that may lead back to itself, so a damaged file can take all memory or never come back. Both stand in plain
sight: an entry is (length u32, address of a heap, number of an object u32), and a heap is `GCOL`, version 1, its size,
and objects one behind the other, each (number u16, references u16, 4 bytes, size). Layout: HDF5 File Format
Specification 3.0, sections III.E (global heap) and VIII.A (variable-length data).
"""

import mmap
import os
import zlib
from typing import Any

import numpy as np

_DEFLATE, _SHUFFLE, _FLETCHER = 1, 2, 3
_HEAP = b"GCOL\x01"


def check_column(path: str | os.PathLike[str], file: Any, name: str) -> None:
    """Raises ValueError unless the dataset `name` of the opened `file` is a list that can be read without harm.

    It must stand in this very file and have no more entries, and its entries no more bytes, than the file has. Entries
    under a filter other than gzip, shuffle and checksums are not looked into.
    """
    import h5py  # whoever opened the file has it

    inside = isinstance(file.get(name, getlink=True), h5py.HardLink)  # asked first: a link may open another file
    column = file[name] if inside else None
    if not isinstance(column, h5py.Dataset) or column.ndim != 1 or column.is_virtual or column.external:
        raise ValueError(f"{path}: `{name}` is no list of this file")
    size = os.path.getsize(path)
    if len(column) > size:
        raise ValueError(f"{path}: `{name}` names {len(column)} entries, more than the file has bytes")
    inner = h5py.check_vlen_dtype(column.dtype)
    if inner is None or not column.id.get_storage_size():
        return
    if file.userblock_size or column.id.get_create_plist().get_layout() == h5py.h5d.COMPACT:
        raise ValueError(f"{path}: `{name}` has a layout that this program does not read; write it again with h5py")
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        address, length = file.id.get_create_plist().get_sizes()
        entries = _entries(data, column, address)
        if int(entries["length"].astype(np.int64).sum()) * np.dtype(inner).itemsize > size:
            raise ValueError(f"{path}: damaged, the entries of `{name}` claim more bytes than the file has")
        for heap in np.unique(entries["heap"][entries["length"] > 0]).tolist():
            if not _is_whole(data, heap, length):
                raise ValueError(f"{path}: damaged, an entry of `{name}` leads to no heap of data")


def _entries(data: mmap.mmap, column: Any, address: int) -> np.ndarray:
    """(length, heap, number) of every entry that is stored and can be looked into."""
    kind = np.dtype([("length", "<u4"), ("heap", f"<u{address}"), ("number", "<u4")])
    if column.chunks is None:
        return _table(data[column.id.get_offset() :][: column.id.get_storage_size()], kind)
    plist = column.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    if not set(filters) <= {_DEFLATE, _SHUFFLE, _FLETCHER}:
        return np.empty(0, kind)
    most = column.chunks[0] * kind.itemsize + 4
    chunks: list[Any] = []
    column.id.chunk_iter(lambda chunk: chunks.append(chunk))
    tables = []
    for chunk in chunks:
        table = data[chunk.byte_offset : chunk.byte_offset + chunk.size]
        for number, filter_ in reversed(list(enumerate(filters))):
            if not chunk.filter_mask >> number & 1:
                table = _undone(table, filter_, kind.itemsize, most)
        tables.append(_table(table, kind))
    return np.concatenate(tables) if tables else np.empty(0, kind)


def _undone(table: bytes, filter_: int, width: int, most: int) -> bytes:
    """A table of entries before a filter went over it, at most `most` bytes."""
    if filter_ == _FLETCHER:
        return table[:-4]
    if filter_ == _SHUFFLE:
        rows = len(table) // width
        return np.frombuffer(table, np.uint8, rows * width).reshape(width, rows).T.tobytes()
    try:
        return zlib.decompressobj().decompress(table, most)
    except zlib.error as error:
        raise OSError(f"compressed data: {error}") from error


def _table(data: bytes, kind: np.dtype) -> np.ndarray:
    return np.frombuffer(data, kind, len(data) // kind.itemsize)


def _is_whole(data: mmap.mmap, at: int, width: int) -> bool:
    """Whether a heap stands at byte `at` whose objects come one behind the other up to its end."""
    head = 8 + width
    if data[at : at + len(_HEAP)] != _HEAP:
        return False
    end = at + int.from_bytes(data[at + 8 : at + head], "little")
    if not at + head <= end <= len(data):
        return False
    at += head
    while at + head <= end:
        number = int.from_bytes(data[at : at + 2], "little")
        size = int.from_bytes(data[at + 8 : at + head], "little")
        step = head + -(-size // 8) * 8 if number else size  # object 0 is what is free, its own head included
        if step <= 0 or at + step > end:
            return False
        at += step
    return True
