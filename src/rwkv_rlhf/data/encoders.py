"""Texts to token ids with all cores: jobs go to processes and come back in the order in which they were given.

Reading, templates, draws and counts stay in the process that asks, so what is written has the bytes that one process
would write, and the first error is the one that it would meet.
"""

import functools
import os
import signal
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np

from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_rlhf.host_cores import host_cores

T = TypeVar("T")

WORTH = 8 << 20  # bytes of input below which starting processes takes longer than they save
_BATCH = 1 << 18  # characters that are sent at a time
_AHEAD = 3  # batches for each process that may wait


class Job(NamedTuple):
    """Texts of one document, each tokenised by itself, as `template` writes ids (None: byte for byte)."""

    texts: tuple[str, ...]
    template: Template | None = None


class Encoded(NamedTuple):
    """The ids of a job's texts, each (n,) int64. `exact`: whether they decode to the texts, where that was asked."""

    ids: list[np.ndarray]
    exact: bool = True


def encoded(job: Job, tokenizer: Tokenizer, check: bool) -> Encoded:
    """The ids of one job. Raises ValueError as `Tokenizer.encode`."""
    template = job.template
    found = [tokenizer.encode(text) if template is None else template.ids(text, tokenizer) for text in job.texts]
    exact = not check or all(_reversible(text, ids, tokenizer) for text, ids in zip(job.texts, found, strict=True))
    return Encoded([np.asarray(ids, np.int64) for ids in found], exact)


def _reversible(text: str, ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether the ids give the text back, or its composed form (the 20B vocabulary has the normaliser NFC)."""
    found = tokenizer.decode_bytes(ids)
    if found == text.encode("utf-8", errors="surrogatepass"):
        return True
    return unicodedata.normalize("NFC", found.decode(errors="replace")) == unicodedata.normalize("NFC", text)


def workers_for(spec: str | os.PathLike[str], asked: int = 0) -> int:
    """How many processes tokenise the files of `spec`: as `asked`; 0 = one a core where there is enough to do, else 1.

    Raises ValueError for a negative number.
    """
    if asked < 0:
        raise ValueError(f"--workers {asked}: must be 1 or more, or 0 for one a core")
    if asked:
        return asked
    size = sum(os.path.getsize(source.path) for source in sources_of(spec) if os.path.isfile(source.path))
    cores = host_cores()
    return cores if size >= WORTH else 1


class Encoders(AbstractContextManager["Encoders"]):
    """Tokenises here, or in `workers` processes where that is more than one.

    vocab_file: that of the tokenizer, which the processes load for themselves. check: see `Encoded.exact`.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_file: str = "", workers: int = 1, check: bool = False) -> None:
        self._tokenizer, self._check, self._workers = tokenizer, check, workers
        self._work = functools.partial(_encode_batch, tokenizer.vocab_size, vocab_file or None, check)
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _started) if workers > 1 else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, jobs: Iterable[tuple[T, Job]]) -> Iterator[tuple[T, Encoded]]:
        """Each job's companion with its ids, in their order.

        Raises ValueError as `encoded`, what `jobs` raises after everything before it has come back, and one sentence
        when a process was ended from outside.
        """
        if self._pool is None:
            for companion, job in jobs:
                yield companion, encoded(job, self._tokenizer, self._check)
            return
        waiting: deque[tuple[list[T], Future[list[Encoded]]]] = deque()
        try:
            late: Exception | None = None
            batches = _batches(jobs)
            while True:
                try:
                    companions, batch = next(batches)
                except StopIteration:
                    break
                except Exception as error:  # of the reader: after what it gave before
                    late = error
                    break
                waiting.append((companions, self._pool.submit(self._work, batch)))
                if len(waiting) > self._workers * _AHEAD:
                    yield from _received(waiting)
            while waiting:
                yield from _received(waiting)
            if late is not None:
                raise late
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenises was ended from outside (out of memory?): nothing was written; run the "
                "command again, with --workers 1 if that happens twice"
            ) from error


def _received(waiting: deque[tuple[list[T], Future[list[Encoded]]]]) -> Iterator[tuple[T, Encoded]]:
    companions, found = waiting.popleft()
    yield from zip(companions, found.result(), strict=True)


def _batches(jobs: Iterable[tuple[T, Job]]) -> Iterator[tuple[list[T], list[Job]]]:
    """Jobs in groups of about _BATCH characters; what an error leaves over comes before it."""
    companions: list[T] = []
    batch: list[Job] = []
    size = 0
    try:
        for companion, job in jobs:
            companions.append(companion)
            batch.append(job)
            size += sum(map(len, job.texts)) + 1
            if size >= _BATCH:
                yield companions, batch
                companions, batch, size = [], [], 0
    except Exception:  # of the reader: after what it gave before
        if batch:
            yield companions, batch
        raise
    if batch:
        yield companions, batch


def _started() -> None:
    """In a new process: Ctrl-C is for the one that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_batch(vocab_size: int, vocab_file: str | None, check: bool, batch: Sequence[Job]) -> list[Encoded]:
    """What a process does. `load_tokenizer` keeps the vocabulary from one batch to the next."""
    tokenizer = load_tokenizer(vocab_size, vocab_file)
    return [encoded(job, tokenizer, check) for job in batch]
