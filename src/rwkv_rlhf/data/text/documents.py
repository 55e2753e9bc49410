"""Text to learn from: plain documents, chats, prompt and completion; held as one flat array of token ids."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_rlhf.data.batch import TextExample
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.encoders import Encoded, Encoders, Job, encoded
from rwkv_rlhf.data.items import Reading, read_file
from rwkv_rlhf.data.opened import read_unpacked
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import rows_format
from rwkv_rlhf.data.shapes.record import Chat, Document, Pair
from rwkv_rlhf.data.sources import Source, sources_of
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates, say_plain_marks
from rwkv_rlhf.data.templates.template import Span, Template
from rwkv_rlhf.data.text.binidx import Corpus, Slices, is_corpus
from rwkv_rlhf.data.text.cut_documents import CutDocuments, trained_before
from rwkv_rlhf.data.text.h5 import H5File, H5Texts, open_h5
from rwkv_rlhf.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, format_of_word
from rwkv_rlhf.settings.implementations import load, with_fact


@dataclass(frozen=True)
class TextOptions:
    """How documents are made of a file: each row's template, who tokenises, what is trained, how records are read."""

    draw: Callable[[], Template]
    encoders: Encoders
    train_on_prompt: bool = False
    reading: Reading = field(default_factory=Reading)


class Texts(CutDocuments):
    """Documents (or segments of them), held in memory.

    Attributes:
        tokens: (N,) all ids end to end. mask: (N,) which are trained as targets, or None = all.
    """

    def __init__(self, documents: Iterator[TextExample], vocab_size: int, ctx_len: int, report: DataReport) -> None:
        super().__init__(ctx_len, report)
        kind = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        parts, masks, ends, masked = [np.empty(0, kind)], [], [0], False
        order: list[int] = []  # a document that comes again is the same object, and held once
        last = None
        for document in documents:
            order.append(len(ends) - (2 if document is last else 1))
            if document is last:
                continue
            last = document
            parts.append(np.asarray(document.tokens, dtype=kind))
            masks.append(np.broadcast_to(True, len(parts[-1])) if document.mask is None else document.mask)
            masked = masked or document.mask is not None
            ends.append(ends[-1] + len(parts[-1]))
        self.tokens = np.concatenate(parts)
        self.mask = np.concatenate(masks) if masked else None
        before = trained_before(self.mask)
        for number in order:
            self._cut(number, ends[number], ends[number + 1], before)
        self._close()

    def __getitem__(self, index: int) -> TextExample:
        _, begin, end, _ = self.segments[index]
        return TextExample(self.tokens[begin:end], None if self.mask is None else self.mask[begin:end])


class _Written(NamedTuple):
    """A document as pieces of text, each tokenised by itself: a chat's spans, or one text without a template."""

    spans: tuple[Span, ...]
    template: Template | None = None

    @property
    def job(self) -> Job:
        """What is to be tokenised."""
        return Job(tuple(span.text for span in self.spans), self.template)

    def example(self, found: Encoded, train_on_prompt: bool) -> TextExample:
        """The document with its ids: of a text all are trained, and so is the end of document behind it."""
        if self.template is None:
            return TextExample(np.append(found.ids[0], END_OF_DOCUMENT))
        ids: list[np.ndarray] = [np.empty(0, np.int64)]
        mask: list[np.ndarray] = [np.empty(0, bool)]
        for span, new in zip(self.spans, found.ids, strict=True):
            end = self.template.end_ids if span.answer else ()
            ids += [new, np.asarray(end, np.int64)]
            mask.append(np.broadcast_to(span.answer and span.trained, len(new) + len(end)))
        return TextExample(np.concatenate(ids), None if train_on_prompt else np.concatenate(mask))


def _plain(text: str) -> _Written:
    """A text byte for byte."""
    return _Written((Span(text, True),))


def _chat(turns: Sequence[Turn], template: Template, train_on_prompt: bool) -> _Written:
    """A chat, of which the assistant's turns are trained with their closing mark.

    Everything between two answers is one piece of text, tokenised apart from the answers, as sampling meets it.
    """
    spans = list(template.spans(turns))
    if spans and not spans[-1].answer and not train_on_prompt:
        spans.pop()  # turns that nobody answered teach nothing
    return _Written(tuple(spans), template)


def tokenise_chat(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, train_on_prompt: bool = False
) -> TextExample:
    """A chat as tokens, of which the assistant's turns are trained. Raises RowError where the template refuses it."""
    written = _chat(turns, template, train_on_prompt)
    return written.example(encoded(written.job, tokenizer, check=False), train_on_prompt)


def row_documents(path: str, tokenizer: Tokenizer, report: DataReport, options: TextOptions) -> Iterator[TextExample]:
    """The documents and chats of a file that is read row by row."""
    for written, found in options.encoders.map(_row_texts(path, report, options)):
        yield written.example(found, options.train_on_prompt)


def _row_texts(path: str, report: DataReport, options: TextOptions) -> Iterator[tuple[_Written, Job]]:
    kinds = ("text", "pairs") if options.reading.chosen else ("text",)
    for where, item, _ in read_file(Source(path), report, kinds, options.reading):
        try:
            if isinstance(item, Document):
                written = _plain(item.text)
            else:
                assert isinstance(item, Chat | Pair)
                turns = item.turns if isinstance(item, Chat) else (*item.turns, Turn("assistant", item.chosen))
                written = _chat(turns, options.draw(), options.train_on_prompt)
        except RowError as error:
            report.bad(where, error)
            continue
        yield written, written.job


def txt_documents(path: str, tokenizer: Tokenizer, report: DataReport, options: TextOptions) -> Iterator[TextExample]:
    """The one document that a text file is."""
    data = read_unpacked(path)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    report.rows += 1
    written = _plain(text)
    yield written.example(encoded(written.job, tokenizer, check=False), options.train_on_prompt)


def binidx_documents(
    path: str, tokenizer: Tokenizer, report: DataReport, options: TextOptions
) -> Iterator[TextExample]:
    """The documents of a binidx corpus."""
    corpus = Corpus(path, tokenizer.vocab_size)
    for number in range(len(corpus)):
        report.rows += 1
        yield TextExample(corpus.document(number))


def h5_documents(path: str, tokenizer: Tokenizer, report: DataReport, options: TextOptions) -> Iterator[TextExample]:
    """The documents of an .h5, whole."""
    file = H5File(path)
    for number in range(len(file)):
        report.rows += 1
        try:
            document = file.document(number, tokenizer.vocab_size)
        except RowError as error:
            report.bad(f"{path} document {number}", error)
            continue
        yield TextExample(document.tokens) if options.train_on_prompt else document


def text_type(path: str | os.PathLike[str], data_type: str = "") -> str:
    """The data type of the text that `path` stands for: as given, or by what it names.

    Raises ValueError that lists the legal types, and for several files of which one can only be read alone.
    """
    sources = sources_of(path)
    found = [_type_of_one(source.path, data_type) for source in sources]
    alone = [(source.path, name) for source, name in zip(sources, found) if not _reads_beside_others(name)]
    if alone and len(sources) > 1:
        raise ValueError(f"{alone[0][0]}: {alone[0][1]} is not read beside other files; give it alone")
    if alone and sources[0].weight != 1:
        raise ValueError(f"{alone[0][0]}: a weight is for rows and text files, not for {alone[0][1]}")
    return found[0]


def _reads_beside_others(name: str) -> bool:
    return not FORMATS[name].tokenised


def _type_of_one(path: str, data_type: str) -> str:
    if not data_type and is_corpus(path):
        return "binidx"
    found = format_of_word(data_type) if data_type else rows_format(path) or format_of_name(path)
    if not found or not FORMATS[found].text:
        named = data_type or Path(path).suffix.lower().lstrip(".")
        named = f"--data_type {named}" if named else "a name without a suffix (and no .bin and .idx beside it)"
        legal = ", ".join(with_fact(FORMATS, lambda facts: facts.text))
        raise ValueError(f"{path}: {named} is no text that can be read; one of {legal}")
    return found


def read_documents(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    report: DataReport,
    *,
    data_type: str = "",
    template: str = "world",
    train_on_prompt: bool = False,
    seed: int = TEMPLATE_SEED,
    reading: Reading | None = None,
    encoders: Encoders | None = None,
) -> Iterator[TextExample]:
    """The documents of all files that `path` stands for, one after the other; with weight 2 each comes twice.

    encoders: of this tokenizer; None = those of this process.
    Raises ValueError, one sentence with file and line, or flag.
    """
    rng = random.Random(seed)
    find_templates(template)
    text_type(path, data_type)

    def draw() -> Template:
        return draw_template(template, rng)

    options = TextOptions(draw, encoders or Encoders(tokenizer), train_on_prompt, reading or Reading())
    for source in sources_of(path):
        read: Callable[..., Iterator[TextExample]] = load(FORMATS[_type_of_one(source.path, data_type)].text)
        copies = source.copies()
        for document in read(source.path, tokenizer, report, options):
            for _ in range(next(copies)):
                yield document


def open_text(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    ctx_len: int = 0,
    data_type: str = "",
    template: str = "world",
    train_on_prompt: bool = False,
    seed: int = TEMPLATE_SEED,
    skip_bad: bool = False,
    reading: Reading | None = None,
) -> Texts | H5Texts:
    """Documents and chats of files with records, text files, a binidx corpus or .h5.

    `text` documents are tokenised byte for byte and end with token 0; chats are normalised, follow the template, and
    train the assistant's turns only. An .h5 is read document by document during training, everything else at once.

    Args:
        path: a file, or what `sources_of` takes. ctx_len: longest example in inputs; longer documents are cut into
            segments. 0 = never cut. reading: how records are read.

    Raises:
        ValueError: one sentence with file and line, or flag.
    """
    find_templates(template)
    if text_type(path, data_type) == "h5":
        alone = sources_of(path)[0].path
        return open_h5(alone, tokenizer.vocab_size, ctx_len=ctx_len, train_on_prompt=train_on_prompt, skip_bad=skip_bad)
    report = DataReport(str(path), skip_bad=skip_bad)
    say_plain_marks(template, tokenizer, report)
    documents = read_documents(
        path,
        tokenizer,
        report,
        data_type=data_type,
        template=template,
        train_on_prompt=train_on_prompt,
        seed=seed,
        reading=reading,
    )
    return Texts(documents, tokenizer.vocab_size, ctx_len, report)


def open_slices(path: str | os.PathLike[str], vocab_size: int, ctx_len: int, stride: int) -> tuple[Slices, DataReport]:
    """A binidx corpus as slices of ctx_len + 1 tokens `stride` apart, and its counts; needs no tokenizer."""
    corpus = Corpus(path, vocab_size)
    slices = Slices(corpus, ctx_len, stride)
    report = DataReport(str(path), rows=len(corpus), examples=len(slices), lengths=corpus.sizes)
    report.trained = len(corpus.tokens) - 1
    return slices, report
