"""JSONL (text, chats, prompt and completion) -> tokenised documents in HDF5 for --sft 1 --train_data_file F.h5.

The file holds what train.py would make of the JSONL itself: `{"text"}` byte for byte, closed by token 0; chats by the
template, with a mask so that the assistant's turns are learnt only. The older programs read it too (their dataset
`tokens`); they know no mask and learn every token.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from PrepareOrpoDataset import vocabulary_size
from src.cli import Parser, run
from src.data.batch import TextExample
from src.data.h5 import writing
from src.data.pieces import NOTHING_TRAINED
from src.data.progress import counted
from src.data.report import DataReport
from src.data.templates import TEMPLATES, check_template
from src.data.text import read_documents, text_type
from src.data.tokenizer import WORLD_SIZE, Tokenizer, load_tokenizer
from src.files import check_writable, refuse_same_file

log = logging.getLogger("sft")

BATCH = 1000  # documents written at a time
MIXED_SEED = 100


def add_document_flags(flags: Parser, output: str) -> None:
    """Adds the flags of every script that turns documents into an .h5, by default `output`."""
    flags.add_argument("--input_folder", "--input", required=True, help="a folder of *.jsonl, or one file of text")
    flags.add_argument("--output_parquet", "--output_h5", default=output, help=f"the .h5 to write [{output}]")
    flags.add_argument("--template", default="world", help=f"of chats: one of {', '.join(TEMPLATES)} [world]")
    flags.add_switch("--train_on_prompt", help="chats: learn all turns, not only the assistant's")
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")
    flags.add_argument("--random_seed", type=int, default=MIXED_SEED, help=f"of the template mixed [{MIXED_SEED}]")
    flags.add_switch("--skip_bad", help="count and skip bad rows instead of stopping")


def input_files(flags: Namespace) -> list[Path]:
    """The files of --input_folder in the order of their names; ValueError where there is none."""
    named = Path(flags.input_folder)
    if not named.exists():
        raise ValueError(f"--input_folder {named}: there is no such folder or file")
    if not named.is_dir():
        text_type(named)
        return [named]
    found = sorted(path for path in named.iterdir() if path.suffix.lower() == ".jsonl")
    if not found:
        raise ValueError(f"--input_folder {named}: holds no .jsonl")
    return found


def check_document_flags(flags: Namespace) -> list[Path]:
    """The files to read. Refuses, before anything slow, what could not be read or written."""
    check_template(flags.template)
    files = input_files(flags)
    for path in files:
        refuse_same_file(path, flags.output_parquet, "--output_parquet")
    check_writable(flags.output_parquet)
    return files


def examples_of(
    files: Sequence[Path], flags: Namespace, tokenizer: Tokenizer, report: DataReport
) -> Iterator[TextExample]:
    """The documents of all files in order, counted in `report`; those without a trained token are left out."""
    for path in files:
        read = read_documents(
            path,
            tokenizer,
            report,
            template=flags.template,
            train_on_prompt=flags.train_on_prompt,
            seed=flags.random_seed,
        )
        for ids, mask in read:
            kind = np.int32  # half the memory of what is written
            example = TextExample(np.asarray(ids, dtype=kind), None if mask is None else np.asarray(mask, dtype=bool))
            if not example.trained():
                report.skip(NOTHING_TRAINED)
                continue
            report.examples += 1
            report.trained += example.trained()
            report.lengths.append(len(example.tokens))
            yield example


def count_lines(files: Sequence[Path]) -> int:
    """Lines of all files, for the progress bar."""
    total = 0
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total += block.count(b"\n")
    return total


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise documents and chats into an .h5 for supervised fine-tuning.")
    flags.add_argument("--load_model", default="", help="checkpoint whose vocabulary size is used; it is not run")
    flags.add_argument("--vocab_size", type=int, default=0, help=f"vocabulary size if no model is given [{WORLD_SIZE}]")
    add_document_flags(flags, "sft.h5")
    return flags


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, writes."""
    flags = parser().parse_args(argv)
    files = check_document_flags(flags)
    tokenizer = load_tokenizer(vocabulary_size(flags.load_model, flags.vocab_size), flags.vocab_file or None)
    report = DataReport(flags.input_folder, skip_bad=flags.skip_bad)
    about = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "template": flags.template,
        "train_on_prompt": int(flags.train_on_prompt),
    }
    with writing(flags.output_parquet, about) as out, counted(count_lines(files), "documents", True) as done:
        examples = examples_of(files, flags, tokenizer, report)
        while batch := list(islice(examples, BATCH)):
            out.add(batch)
            done(len(batch))
        if not out.documents:
            raise ValueError(f"{flags.input_folder}: holds no text to train on ({report.rows} rows read)")
    for line in report.lines():
        log.info("%s", line)
    log.info("wrote %d documents, %d tokens to %s", out.documents, out.tokens, flags.output_parquet)


if __name__ == "__main__":
    run(main)
