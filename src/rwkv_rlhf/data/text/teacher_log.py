"""Documents with a teacher's logits, appended batch by batch: the unfinished work of a long run.

HDF5 cannot promise to survive a kill, so such a run writes here first and makes its .h5 of it at the end. The first
line is JSON and says what the batches were made of.

n documents, L tokens of each, K teacher's logits per token.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rwkv_rlhf.data.batch import TextExample, TopK
from rwkv_rlhf.files import AppendLog, OtherHead, Sized, parse_json


class TeacherLog:
    """The batches that are done, in order.

    Attributes:
        batches, documents: how many there are.
        cut: bytes of a half-written batch that were cut off when the file was opened.

    Raises:
        ValueError: the file exists and belongs to other inputs or settings, or is no such log.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any], k: int) -> None:
        self.k = k
        self.batches = self.documents = self.cut = 0
        self._log = AppendLog(path, Sized(b"DOCS"), json.dumps(about, sort_keys=True).encode() + b"\n")
        try:
            there = self._log.resume()
        except OtherHead as other:
            raise ValueError(f"{path}: {_what_differs(other.head, about)}") from None
        if not there:
            self._log.begin()
        for batch in self._log.records():
            self.batches += 1
            self.documents += struct.unpack_from("<Q", batch)[0]
        self.cut = self._log.keep()

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
        self._log.append(b"".join(parts))
        self.batches += 1
        self.documents += len(examples)

    def __iter__(self) -> Iterator[list[TextExample]]:
        return map(self._batch, self._log.records())

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
        self._log.remove()


def _what_differs(head: bytes, about: dict[str, Any]) -> str:
    """Why a log that begins with the line `head` is not one of a run about `about`, and what to do."""
    try:
        was = parse_json(head)
    except ValueError:
        was = None
    if not isinstance(was, dict):
        return "not the unfinished work of this script; move it away"
    other = ", ".join(sorted(key for key in {*was, *about} if was.get(key) != about.get(key)))
    return f"unfinished work of a run with another {other}; give the same to go on with it, or delete it to begin anew"
