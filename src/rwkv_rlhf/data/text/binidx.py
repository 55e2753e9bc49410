"""Megatron's memory-mapped corpus: PREFIX.bin holds token ids end to end, PREFIX.idx says where documents are.

.idx, little endian, no padding: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype, u64 n, u64 d, n * i32 sizes in tokens,
n * i64 byte pointers into .bin, d * i64 document index (0..n). Tools disagree on the dtype they write for the same
vocabulary, so the dtype byte is honoured.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkv_rlhf.data.batch import TextExample
from rwkv_rlhf.files import atomic_write, read_bytes

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# dtype byte -> what .bin holds; 6 is float64 in Megatron and never holds token ids
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
_CHECK = 1 << 22  # tokens looked at in one go when ids are checked


def corpus_prefix(path: str | os.PathLike[str]) -> Path:
    """PREFIX of PREFIX, PREFIX.bin or PREFIX.idx."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a corpus: both files are there."""
    prefix = str(corpus_prefix(path))
    return os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin")


class Corpus:
    """A binidx corpus, read through a memory map.

    Attributes:
        tokens: (N,) all ids, in the file's own dtype.
        sizes: (n,) int32 tokens of each document.

    Raises:
        ValueError: a missing or truncated file, a wrong magic, version or dtype, sizes and pointers that do not fit
            together, or (when vocab_size is given) an id outside the vocabulary; each names the file.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int | None = None):
        self.prefix = corpus_prefix(path)
        self.idx, self.bin = f"{self.prefix}.idx", f"{self.prefix}.bin"
        kind, self.sizes, pointers = _read_index(self.idx)
        self._check(kind, pointers)
        self.tokens = np.memmap(self.bin, dtype=kind, mode="r") if int(self.sizes.sum()) else np.empty(0, kind)
        if vocab_size is not None:
            self._check_ids(vocab_size)

    def __len__(self) -> int:
        return len(self.sizes)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, a view into the map."""
        start = int(self.offsets[index])
        return self.tokens[start : start + int(self.sizes[index])]

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n,) int64, where each document begins, in tokens."""
        starts: np.ndarray = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        return starts

    def _check(self, kind: np.dtype, pointers: np.ndarray) -> None:
        ends = np.cumsum(self.sizes, dtype=np.int64)
        starts = ends - self.sizes
        if not np.array_equal(pointers, starts * kind.itemsize):
            row = int(np.flatnonzero(pointers != starts * kind.itemsize)[0])
            raise ValueError(
                f"{self.idx}: the pointer of document {row} is {pointers[row]}, but the sizes before it say "
                f"{starts[row] * kind.itemsize}"
            )
        need = int(ends[-1]) * kind.itemsize if len(ends) else 0
        try:
            have = os.path.getsize(self.bin)
        except OSError as error:
            raise ValueError(f"{self.bin}: cannot be read ({error.strerror})") from error
        if have < need:
            raise ValueError(f"{self.bin} is truncated: {have} bytes, but {self.idx} describes {need}")
        if have > need:
            raise ValueError(
                f"{self.bin} has {have} bytes, but {self.idx} describes {need}: the two do not belong together"
            )

    def _check_ids(self, vocab_size: int) -> None:
        info = np.iinfo(self.tokens.dtype)
        if info.min >= 0 and info.max < vocab_size:
            return
        for start in range(0, len(self.tokens), _CHECK):
            part = self.tokens[start : start + _CHECK]
            wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
            if len(wrong):
                at = start + int(wrong[0])
                document = int(np.searchsorted(self.offsets, at, side="right")) - 1
                raise ValueError(
                    f"{self.bin}: document {document} holds token id {self.tokens[at]} at position {at}, "
                    f"but the model's vocab_size is {vocab_size}"
                )


def _read_index(path: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(dtype of .bin, sizes, pointers) of an .idx file."""
    data = read_bytes(path)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path}: not an index of the binidx format (its first bytes are not MMIDIDX)")
    if len(data) < _HEADER.size:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, the header alone has {_HEADER.size}")
    _, version, code, count, entries = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{path}: version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        raise ValueError(f"{path}: dtype byte {code} does not stand for token ids; one of {sorted(DTYPES)}")
    need = _HEADER.size + count * 12 + entries * 8
    if len(data) < need:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, its header describes {need}")
    sizes = np.frombuffer(data, dtype="<i4", count=count, offset=_HEADER.size).copy()  # not all of `data`
    if len(sizes) and int(sizes.min()) < 0:
        raise ValueError(f"{path}: document {int(sizes.argmin())} has the negative size {int(sizes.min())}")
    pointers = np.frombuffer(data, dtype="<i8", count=count, offset=_HEADER.size + 4 * count)
    return np.dtype(DTYPES[code]).newbyteorder("<"), sizes, pointers


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (up to 65536 ids, the World vocabulary included), else int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def write_corpus(
    prefix: str | os.PathLike[str], documents: Sequence[np.ndarray], order: Iterator[int], vocab_size: int
) -> int:
    """Writes PREFIX.bin and PREFIX.idx: documents[i] for each i of `order`; returns the number of tokens.

    Both files appear only when both are complete; ids must be below vocab_size.
    """
    kind, sizes, total = token_dtype(vocab_size), [], 0
    prefix = corpus_prefix(prefix)
    with atomic_write(f"{prefix}.idx") as index, atomic_write(f"{prefix}.bin") as data:
        for number in order:
            document = np.asarray(documents[number])
            assert not len(document) or 0 <= int(document.min()) <= int(document.max()) < vocab_size
            data.write(document.astype(kind.newbyteorder("<")).tobytes())
            sizes.append(len(document))
            total += len(document)
        lengths = np.asarray(sizes, dtype=np.int64)
        index.write(_HEADER.pack(MAGIC, VERSION, _CODES[kind], len(sizes), len(sizes) + 1))
        index.write(lengths.astype("<i4").tobytes())
        index.write(((np.cumsum(lengths) - lengths) * kind.itemsize).astype("<i8").tobytes())
        index.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return total


class Slices:
    """Slices of ctx_len + 1 tokens of the whole stream, across document borders, as RWKV-LM trains on it.

    Args:
        corpus: the opened corpus.
        ctx_len: inputs of a slice.
        stride: distance of neighbouring slices in tokens: ctx_len for the magic-prime order, 1 for random slices.
    """

    def __init__(self, corpus: Corpus, ctx_len: int, stride: int):
        assert stride >= 1
        if len(corpus.tokens) <= ctx_len:
            raise ValueError(
                f"{corpus.bin} holds {len(corpus.tokens)} tokens, too few for slices of --ctx_len {ctx_len} and the "
                f"next token: --ctx_len {max(1, len(corpus.tokens) - 1)} is the most"
            )
        self.corpus, self.ctx_len, self.stride = corpus, ctx_len, stride

    def __len__(self) -> int:
        return (len(self.corpus.tokens) - 1 - self.ctx_len) // self.stride + 1

    def __getitem__(self, index: int) -> TextExample:
        start = index * self.stride
        return TextExample(self.corpus.tokens[start : start + self.ctx_len + 1])

    def trained(self, index: int) -> int:
        """Every slice trains ctx_len tokens."""
        return self.ctx_len
