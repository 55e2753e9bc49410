"""What the commands that tokenise documents and chats into `.h5` files have in common: flags and reading."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rwkv_rlhf.commands.flag_values import reading_of
from rwkv_rlhf.data.batch import TextExample
from rwkv_rlhf.data.encoders import Encoders
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import refuse_sources, sources_of
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.text.cut_documents import NOTHING_TRAINED
from rwkv_rlhf.data.text.documents import read_documents, text_type
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import check_writable
from rwkv_rlhf.settings.formats import FORMATS


def check_document_flags(flags: Namespace) -> list[Path]:
    """The files to read. Refuses, before anything slow, what could not be read or written."""
    find_templates(flags.template)
    if not any(mark in flags.input_folder for mark in "*?[,") and not Path(flags.input_folder).exists():
        raise ValueError(f"--input_folder {flags.input_folder}: there is no such folder or file")
    text_type(flags.input_folder)
    refuse_sources(flags.input_folder, flags.output_parquet, "--output_parquet")
    check_writable(flags.output_parquet)
    return [Path(source.path) for source in sources_of(flags.input_folder)]


def examples_of(
    flags: Namespace, tokenizer: Tokenizer, report: DataReport, encoders: Encoders | None = None
) -> Iterator[TextExample]:
    """The documents of all files in order, counted in `report`; those without a trained token are left out."""
    documents = read_documents(
        flags.input_folder,
        tokenizer,
        report,
        template=flags.template,
        train_on_prompt=flags.train_on_prompt,
        seed=flags.random_seed,
        reading=reading_of(flags),
        encoders=encoders,
    )
    for document in documents:
        tokens = np.asarray(document.tokens, dtype=np.int32)  # half the memory of what is written
        example = TextExample(tokens, document.mask)
        if not example.trained():
            report.skip(NOTHING_TRAINED)
            continue
        report.examples += 1
        report.trained += example.trained()
        report.add_length(len(example.tokens))
        yield example


def count_lines(files: Sequence[Path]) -> int:
    """Lines of all files, for the progress bar; 0 where lines say nothing."""
    total = 0
    for path in files:
        if path.is_dir() or path.suffix.lower() not in FORMATS["jsonl"].suffixes:
            return 0
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total += block.count(b"\n")
    return total
