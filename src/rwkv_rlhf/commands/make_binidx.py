"""Rows with `text` -> PREFIX.bin and PREFIX.idx, a corpus for --data_type binidx.

Each document is tokenised byte for byte and closed by token 0; with --repeats N the documents are written N times, each
time in another seeded order. Decoding is checked against the text, and the written files are read back and compared.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rwkv_rlhf.commands.parsers.make_binidx import parser
from rwkv_rlhf.data.encoders import Encoders, Job, workers_for
from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.sampler import magic_prime
from rwkv_rlhf.data.shapes.record import Document, Item
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.text.binidx import Corpus, corpus_prefix, token_dtype, write_corpus
from rwkv_rlhf.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from rwkv_rlhf.files import check_writable
from rwkv_rlhf.settings.counted import counted

log = logging.getLogger("binidx")


class _Text(NamedTuple):
    """A document that is being tokenised: where its row stands, and how often it is used."""

    where: str
    copies: list[int]


def read_documents(
    path: str, tokenizer: Tokenizer, report: DataReport, encoders: Encoders | None = None
) -> list[np.ndarray]:
    """Token ids of each document, its end included; of a file with weight 2 each twice, as the same array.

    encoders: checking ones; None = those of this process. Raises ValueError with file and line.
    """
    documents: list[np.ndarray] = []
    for text, found in (encoders or Encoders(tokenizer, check=True)).map(_texts(path, report)):
        if not found.exact:
            error = RowError("the vocabulary does not give this text back", "not reversible")
            for _ in range(len(text.copies)):
                report.bad(text.where, error)
            continue
        ids = np.append(found.ids[0], END_OF_DOCUMENT).astype(token_dtype(tokenizer.vocab_size))
        documents += [ids] * len(text.copies)
    if not documents:
        raise ValueError(f"{path}: holds no text")
    return documents


def _texts(path: str, report: DataReport) -> Iterator[tuple[_Text, Job]]:
    """The documents of all files, each once."""
    last: Item | None = None
    waiting: tuple[_Text, Job] | None = None
    for where, item, _ in read_items(path, report, ("text",)):
        if item is last and waiting is not None:
            waiting[0].copies.append(1)
            continue
        if waiting is not None:
            yield waiting
        last, waiting = item, None
        if isinstance(item, Document):
            waiting = _Text(where, [1]), Job((item.text,))
        else:
            report.bad(where, RowError("needs text under the key text; a chat is for sft_generate_h5.py", "no text"))
    if waiting is not None:
        yield waiting


def orders(count: int, repeats: int, seed: int, shuffle: bool) -> Iterator[int]:
    """0..count-1, `repeats` times over, each time in another order."""
    rng = random.Random(seed)
    for _ in range(repeats):
        once = list(range(count))
        if shuffle:
            rng.shuffle(once)
        yield from once


def verify(prefix: str, documents: Sequence[np.ndarray], order: Iterator[int]) -> Corpus:
    """The written corpus, read back; RuntimeError when a document differs from what was to be written."""
    corpus = Corpus(prefix)
    count = 0
    for number, source in enumerate(order):
        if number >= len(corpus) or not np.array_equal(corpus.document(number), documents[source]):
            raise RuntimeError(f"{corpus.bin}: document {number} does not read back as it was written")
        count += 1
    if count != len(corpus):
        raise RuntimeError(f"{corpus.idx}: {len(corpus)} documents where {count} were written")
    return corpus


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, writes, reads back."""
    flags = parser().parse_args(argv)
    prefix = str(corpus_prefix(flags.output))
    for suffix in (".bin", ".idx"):
        refuse_sources(flags.input, prefix + suffix, "--output")
        check_writable(prefix + suffix)
    tokenizer = load_tokenizer(flags.vocab_size, flags.vocab_file or None)
    report = DataReport(flags.input, skip_bad=flags.skip_bad)
    workers = workers_for(flags.input, flags.workers)
    with Encoders(tokenizer, vocab_file=flags.vocab_file, workers=workers, check=True) as encoders:
        documents = read_documents(flags.input, tokenizer, report, encoders)
    plan = (len(documents), flags.repeats, flags.random_seed, flags.shuffle)
    tokens = write_corpus(prefix, documents, orders(*plan), tokenizer.vocab_size)
    corpus = verify(prefix, documents, orders(*plan))
    report.examples, report.trained = len(corpus), tokens - 1
    report.lengths = [len(document) for document in documents]
    for line in report.lines():
        log.info("%s", line)
    log.info(
        "wrote %s.bin and .idx: %s, %s, %s, read back",
        prefix,
        counted(len(corpus), "document"),
        counted(tokens, "token"),
        corpus.tokens.dtype,
    )
    prime = magic_prime(tokens, flags.ctx_len)
    found = f"--magic_prime {prime}" if prime else f"no magic prime: fewer than {3 * flags.ctx_len} tokens"
    log.info("%s (--ctx_len %d)", found, flags.ctx_len)
