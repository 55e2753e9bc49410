"""A file that grows by whole batches of documents with a teacher's logits, and survives a kill at any moment.

HDF5 cannot promise that, so a long run writes here first and makes its .h5 of it at the end. The first line is JSON and
says what the batches were made of; a batch is its size, its CRC-32 and its arrays. What a kill left half written is cut
off when the file is opened again.

n documents, L tokens of each, K teacher's logits per token.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_rlhf.data.batch import TextExample, TopK
from rwkv_rlhf.files import parse_json

_HEAD = struct.Struct("<4sQI")  # mark, bytes that follow, their CRC-32
_MARK = b"DOCS"


class Journal:
    """The batches that are done, in order.

    Attributes:
        batches, documents: how many there are.
        cut: bytes of a half-written batch that were cut off when the file was opened.

    Raises:
        ValueError: the file exists and belongs to other inputs or settings, or is no journal.
    """

    def __init__(self, path: str | os.PathLike, about: dict[str, Any], k: int):
        self.path, self.k = Path(path), k
        self.batches = self.documents = self.cut = 0
        self._line = json.dumps(about, sort_keys=True).encode() + b"\n"
        self._begin = len(self._line)
        if self.path.exists():
            self._check(about)
            self._find_end()
        else:
            with open(self.path, "wb") as file:
                file.write(self._line)
                _to_disk(file)

    def _check(self, about: dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            line = file.readline(1 << 20)
        if line == self._line:
            return
        if self._line.startswith(line):  # killed within the first line
            self.path.write_bytes(self._line)
            return
        try:
            was = parse_json(line)
        except ValueError:
            was = None
        if not isinstance(was, dict):
            raise ValueError(f"{self.path}: not the unfinished work of this script; move it away")
        other = sorted(key for key in {*was, *about} if was.get(key) != about.get(key))
        raise ValueError(
            f"{self.path}: unfinished work of a run with another {', '.join(other)}; give the same to go on with it, "
            "or delete it to begin anew"
        )

    def _find_end(self) -> None:
        end = self._begin
        for payload in self._payloads():
            end += _HEAD.size + len(payload)
            self.batches += 1
            self.documents += struct.unpack_from("<Q", payload)[0]
        self.cut = self.path.stat().st_size - end
        if self.cut:
            os.truncate(self.path, end)

    def _payloads(self) -> Iterator[bytes]:
        """The arrays of each whole batch as bytes; ends at the first that is not whole."""
        with open(self.path, "rb") as file:
            file.seek(self._begin)
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                mark, size, check = _HEAD.unpack(head)
                if mark != _MARK or size > self.path.stat().st_size:
                    return
                payload = file.read(size)
                if len(payload) != size or zlib.crc32(payload) != check:
                    return
                yield payload

    def append(self, examples: Sequence[TextExample]) -> None:
        """One batch, on the disk when this returns. Each document carries K logits per token and their lse."""
        lengths = np.array([len(e.tokens) for e in examples], dtype="<i8")
        masked = np.array([e.mask is not None for e in examples], dtype="u1")
        tops = [e.teacher for e in examples if e.teacher is not None]
        assert len(tops) == len(examples) and all(top.lse is not None for top in tops)
        parts = [
            struct.pack("<Q", len(examples)),
            lengths.tobytes(),
            masked.tobytes(),
            *(np.asarray(e.tokens, dtype="<i4").tobytes() for e in examples),
            *(np.asarray(e.mask, dtype="u1").tobytes() for e in examples if e.mask is not None),
            *(np.asarray(top.values, dtype="<f4").tobytes() for top in tops),
            *(np.asarray(top.indices, dtype="<i4").tobytes() for top in tops),
            *(np.asarray(top.lse, dtype="<f4").tobytes() for top in tops),
        ]
        payload = b"".join(parts)
        with open(self.path, "ab") as file:
            file.write(_HEAD.pack(_MARK, len(payload), zlib.crc32(payload)) + payload)
            _to_disk(file)
        self.batches += 1
        self.documents += len(examples)

    def __iter__(self) -> Iterator[list[TextExample]]:
        return (self._batch(payload) for payload in self._payloads())

    def _batch(self, payload: bytes) -> list[TextExample]:
        at = 8
        count = struct.unpack_from("<Q", payload)[0]

        def take(kind: str, size: int) -> np.ndarray:
            nonlocal at
            found = np.frombuffer(payload, dtype=kind, count=size, offset=at)
            at += found.nbytes
            return found

        lengths, masked = take("<i8", count).tolist(), take("u1", count).tolist()
        tokens = [take("<i4", length) for length in lengths]
        masks = [take("u1", length).astype(bool) if on else None for length, on in zip(lengths, masked)]
        values = [take("<f4", length * self.k).reshape(length, self.k) for length in lengths]
        indices = [take("<i4", length * self.k).reshape(length, self.k) for length in lengths]
        lse = [take("<f4", length) for length in lengths]
        return [TextExample(t, m, TopK(v, i, s)) for t, m, v, i, s in zip(tokens, masks, values, indices, lse)]

    def remove(self) -> None:
        """The work is finished and stands elsewhere."""
        self.path.unlink()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
