"""Rows with `text` -> PREFIX.bin and PREFIX.idx, a corpus for --data_type binidx.

Each document is tokenised byte for byte and closed by token 0; with --repeats N the documents are written N times, each
time in another seeded order. Decoding is checked against the text, and the written files are read back and compared.
"""

import logging
import random
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_rlhf.commands.parsers.make_binidx import parser
from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.sampler import magic_prime
from rwkv_rlhf.data.shapes.record import Document
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.text.binidx import Corpus, corpus_prefix, token_dtype, write_corpus
from rwkv_rlhf.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from rwkv_rlhf.files import check_writable

log = logging.getLogger("binidx")


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(text)
    found = tokenizer.decode_bytes(ids)
    if found != text.encode("utf-8", errors="surrogatepass") and not _composed(found, text):
        raise RowError("the vocabulary does not give this text back", "not reversible")
    return [*ids, END_OF_DOCUMENT]


def _composed(found: bytes, text: str) -> bool:
    """Whether a vocabulary that composes characters (the 20B one has the normaliser NFC) gave the same text back."""
    return unicodedata.normalize("NFC", found.decode(errors="replace")) == unicodedata.normalize("NFC", text)


def read_documents(
    path: str, tokenizer: Tokenizer, report: DataReport, reading: Reading | None = None
) -> list[np.ndarray]:
    """Token ids of each document, its end included; of a file with weight 2 each twice, as the same array.

    Raises ValueError with file and line.
    """
    documents: list[np.ndarray] = []
    last = None
    for where, item, _ in read_items(path, report, ("text",), reading):
        if item is last:
            documents.append(documents[-1])
            continue
        try:
            if not isinstance(item, Document):
                raise RowError("needs text under the key text; a chat is for sft_generate_h5.py", "no text")
            documents.append(np.asarray(_encode(item.text, tokenizer), token_dtype(tokenizer.vocab_size)))
            last = item
        except RowError as error:
            report.bad(where, error)
    if not documents:
        raise ValueError(f"{path}: holds no text")
    return documents


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
    for name in ("repeats", "ctx_len"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)}: must be at least 1")
    prefix = str(corpus_prefix(flags.output))
    for suffix in (".bin", ".idx"):
        refuse_sources(flags.input, prefix + suffix, "--output")
        check_writable(prefix + suffix)
    tokenizer = load_tokenizer(flags.vocab_size, flags.vocab_file or None)
    report = DataReport(flags.input, skip_bad=flags.skip_bad)
    documents = read_documents(flags.input, tokenizer, report)
    plan = (len(documents), flags.repeats, flags.random_seed, flags.shuffle)
    tokens = write_corpus(prefix, documents, orders(*plan), tokenizer.vocab_size)
    corpus = verify(prefix, documents, orders(*plan))
    report.examples, report.trained = len(corpus), tokens - 1
    report.lengths = [len(document) for document in documents]
    for line in report.lines():
        log.info("%s", line)
    log.info(
        "wrote %s.bin and .idx: %d documents, %d tokens, %s, read back",
        prefix,
        len(corpus),
        tokens,
        corpus.tokens.dtype,
    )
    prime = magic_prime(tokens, flags.ctx_len)
    found = f"--magic_prime {prime}" if prime else f"no magic prime: fewer than {3 * flags.ctx_len} tokens"
    log.info("%s (--ctx_len %d)", found, flags.ctx_len)
