"""Text to learn from: plain documents, chats, prompt and completion; held as one flat array of token ids.

L tokens of a document. A document longer than ctx_len is cut into segments that overlap by one token, so that every
token after the first is predicted exactly once.
"""

import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_rlhf.data.batch import TextExample
from rwkv_rlhf.data.grouping import NOTHING_TRAINED, segments
from rwkv_rlhf.data.pairs.rows import messages_to_turns
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import read_jsonl
from rwkv_rlhf.data.templates.builtin import Form, Turn, check_template, draw_form, normalise
from rwkv_rlhf.data.text.binidx import Corpus, Slices, is_corpus
from rwkv_rlhf.data.text.h5 import H5File, H5Texts, open_h5
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import read_bytes

END = 0  # end of document, trained like any token
Document = tuple[list[int], list[bool] | None]  # ids and which are trained; None = all


class Texts:
    """Documents (or their segments) in file order.

    Attributes:
        report: what was read and left out.
        tokens: (N,) all ids end to end. mask: (N,) which are trained as targets, or None = all.
        bounds: (examples, 2) begin and end of each example in `tokens`; neighbours of one document share a token.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray | None, ends: np.ndarray, ctx_len: int, report: DataReport):
        self.tokens, self.mask, self.report = tokens, mask, report
        bounds, documents, counts = [], [], []
        # trained targets before each position, so that a piece is counted without looking at its tokens
        before = None if mask is None else np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        for number, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
            report.lengths.append(end - begin)
            kept = len(bounds)
            for at, stop, trained in segments(begin, end, ctx_len, before):
                bounds.append((at, stop))
                documents.append(number)
                counts.append(trained)
            if len(bounds) == kept:
                report.skip(NOTHING_TRAINED)
        if not bounds:
            raise ValueError(f"{report.source}: holds no text to train on ({report.rows} rows read)")
        self.bounds = np.asarray(bounds, dtype=np.int64)
        self._documents, self._counts = np.asarray(documents), np.asarray(counts)
        report.examples, report.trained = len(bounds), int(self._counts.sum())

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> TextExample:
        begin, end = self.bounds[index]
        return TextExample(self.tokens[begin:end], None if self.mask is None else self.mask[begin:end])

    def trained(self, index: int) -> int:
        """Trained targets of an example."""
        return int(self._counts[index])

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.bounds[index, 1] - self.bounds[index, 0])

    def group(self, index: int) -> object:
        """Pieces of one document must not be torn apart by a held-out split."""
        return int(self._documents[index])


def _gather(documents: Iterator[Document], vocab_size: int, ctx_len: int, report: DataReport) -> Texts:
    kind = np.uint16 if vocab_size <= 1 << 16 else np.int32
    parts, masks, ends, total, masked = [], [], [], 0, False
    for ids, mask in documents:
        parts.append(np.asarray(ids, dtype=kind))
        masks.append(len(ids) if mask is None else np.asarray(mask, dtype=bool))
        masked |= mask is not None
        total += len(ids)
        ends.append(total)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=kind)
    flat = None
    if masked:
        flat = np.concatenate([np.ones(m, dtype=bool) if isinstance(m, int) else m for m in masks])
    return Texts(tokens, flat, np.asarray(ends, dtype=np.int64), ctx_len, report)


def tokenise_chat(turns: list[Turn], form: Form, tokenizer: Tokenizer, train_on_prompt: bool = False) -> Document:
    """Ids of a chat and which of them are trained: the assistant's turns with their closing mark.

    Everything between two answers is one piece of text, tokenised apart from the answers, as sampling meets it.
    """
    ids: list[int] = []
    mask: list[bool] = []
    pieces = list(form.pieces(turns))
    if pieces and not pieces[-1][1] and not train_on_prompt:
        pieces.pop()  # turns that nobody answered teach nothing
    for text, answer in pieces:
        new = [*tokenizer.encode(text), *(form.end_ids if answer else ())]
        ids.extend(new)
        mask.extend([answer or train_on_prompt] * len(new))
    return ids, None if train_on_prompt else mask


def _document(record: dict, form: Form, tokenizer: Tokenizer, train_on_prompt: bool) -> Document:
    """One JSONL object as a document; RowError when it is of no known form."""
    if "text" in record:
        if not isinstance(record["text"], str):
            raise RowError("text must be a string", "unreadable")
        return [*tokenizer.encode(record["text"]), END], None
    if "messages" in record:
        if not isinstance(record["messages"], list):
            raise RowError("messages must be a list of {role, content}", "unreadable")
        return tokenise_chat(messages_to_turns(record["messages"], "messages"), form, tokenizer, train_on_prompt)
    if "prompt" in record and "completion" in record:
        turns = []
        for role, key in (("system", "system"), ("user", "prompt"), ("assistant", "completion")):
            value = record.get(key, "" if key == "system" else None)
            if not isinstance(value, str):
                raise RowError(f"{key} must be a string", "unreadable")
            if normalise(value):
                turns.append((role, normalise(value)))
            elif role != "system":
                raise RowError(f"{key} is empty", f"empty {key}")
        return tokenise_chat(turns, form, tokenizer, train_on_prompt)
    raise RowError(f"needs text, messages, or prompt and completion; it has {', '.join(record) or 'no key'}", "no text")


def _jsonl(
    path: str, tokenizer: Tokenizer, report: DataReport, draw: Callable[[], Form], train_on_prompt: bool
) -> Iterator[Document]:
    for where, record in read_jsonl(path, report):
        try:
            document = _document(record, draw(), tokenizer, train_on_prompt)
        except RowError as error:
            report.bad(where, error)
            continue
        yield document


def _txt(
    path: str, tokenizer: Tokenizer, report: DataReport, draw: object, train_on_prompt: bool
) -> Iterator[Document]:
    data = read_bytes(path)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    report.rows += 1
    yield [*tokenizer.encode(text), END], None


def _binidx(
    path: str, tokenizer: Tokenizer, report: DataReport, draw: object, train_on_prompt: bool
) -> Iterator[Document]:
    corpus = Corpus(path, tokenizer.vocab_size)
    for number in range(len(corpus)):
        report.rows += 1
        yield corpus.document(number), None


def _h5(path: str, tokenizer: Tokenizer, report: DataReport, draw: object, train_on_prompt: bool) -> Iterator[Document]:
    file = H5File(path)
    for number in range(len(file)):
        report.rows += 1
        try:
            tokens, mask = file.document(number, tokenizer.vocab_size)
        except RowError as error:
            report.bad(f"{path} document {number}", error)
            continue
        yield tokens, None if train_on_prompt else mask


# data type -> its documents
TEXT_FORMATS: dict[str, Callable[..., Iterator[Document]]] = {
    "jsonl": _jsonl,
    "txt": _txt,
    "binidx": _binidx,
    "h5": _h5,
}


def text_type(path: str | os.PathLike, data_type: str = "") -> str:
    """The data type of a text file: as given, or by what the path names.

    Raises ValueError that lists the legal types.
    """
    if not data_type:
        suffix = Path(path).suffix.lower().lstrip(".")
        data_type = "binidx" if suffix in ("bin", "idx") or is_corpus(path) else suffix
    data_type = {"utf-8": "txt", "hdf5": "h5"}.get(data_type, data_type)  # utf-8: RWKV-LM's name for a text file
    if data_type not in TEXT_FORMATS:
        named = f"--data_type {data_type}" if data_type else "a name without a suffix (and no .bin and .idx beside it)"
        raise ValueError(f"{path}: {named} is no text that can be read; one of {', '.join(TEXT_FORMATS)}")
    return data_type


def read_documents(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    report: DataReport,
    *,
    data_type: str = "",
    template: str = "world",
    train_on_prompt: bool = False,
    seed: int = 100,
) -> Iterator[Document]:
    """The documents of any file of text one after the other, as (ids, which are trained or None = all).

    Raises ValueError, one sentence with file and line, or flag.
    """
    kind, rng = text_type(path, data_type), random.Random(seed)
    check_template(template)

    def draw() -> Form:
        return draw_form(template, rng)

    return TEXT_FORMATS[kind](str(path), tokenizer, report, draw, train_on_prompt)


def open_text(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    ctx_len: int = 0,
    data_type: str = "",
    template: str = "world",
    train_on_prompt: bool = False,
    seed: int = 100,
    skip_bad: bool = False,
) -> Texts | H5Texts:
    """Documents of a JSONL file ({text}, {messages} or {prompt, completion}), a text file, a binidx corpus or .h5.

    `text` documents are tokenised byte for byte and end with token 0; chats are normalised, follow the template, and
    train the assistant's turns only. An .h5 is read piece by piece during training, everything else at once.

    Args:
        ctx_len: longest example in inputs; longer documents are cut into segments. 0 = never cut.

    Raises:
        ValueError: one sentence with file and line, or flag.
    """
    check_template(template)
    if text_type(path, data_type) == "h5":
        return open_h5(path, tokenizer.vocab_size, ctx_len=ctx_len, train_on_prompt=train_on_prompt, skip_bad=skip_bad)
    report = DataReport(str(path), skip_bad=skip_bad)
    how: dict[str, Any] = {"template": template, "train_on_prompt": train_on_prompt, "seed": seed}
    documents = read_documents(path, tokenizer, report, data_type=data_type, **how)
    return _gather(documents, tokenizer.vocab_size, ctx_len, report)


def open_slices(path: str | os.PathLike, vocab_size: int, ctx_len: int, stride: int) -> tuple[Slices, DataReport]:
    """A binidx corpus as slices of ctx_len + 1 tokens `stride` apart, and its counts; needs no tokenizer."""
    corpus = Corpus(path, vocab_size)
    slices = Slices(corpus, ctx_len, stride)
    report = DataReport(str(path), rows=len(corpus), examples=len(slices), lengths=corpus.sizes)
    report.trained = len(corpus.tokens) - 1
    return slices, report
