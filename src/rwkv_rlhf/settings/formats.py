"""Formats of data files: facts of each, as in `tables.py`, and which one a name or a word of --data_type means.

No file is opened here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FormatFacts:
    """A format of data by the suffixes of its files, and who reads what such a file can hold.

    text: documents, read(path, tokenizer, report, draw, train_on_prompt) -> examples. rows: records by column, pairs or
    rated answers, read(path, report, columns) -> rows. pairs: pairs that are no rows, open(path, tokenizer, options,
    ctx_len) -> Pairs. tells: of a file that can hold text or pairs but no rows, whether it holds pairs.
    tokenised: it holds token ids, so template and tokenizer do not matter. words: of --data_type, beside its name.
    packs: a file of it may be packed, with a further suffix of PACKED.
    """

    help: str
    suffixes: tuple[str, ...]
    text: str = ""
    rows: str = ""
    pairs: str = ""
    tells: str = ""
    tokenised: bool = False
    words: tuple[str, ...] = ()
    packs: bool = False

    @property
    def holds(self) -> tuple[str, ...]:
        """What one file can hold: some of "text", "pairs", "rated"."""
        found = {"text": self.text, "pairs": self.rows or self.pairs, "rated": self.rows}
        return tuple(kind for kind, reader in found.items() if reader)


PACKED = (".gz", ".zst")
_DOCUMENTS = ".data.text.documents:row_documents"

FORMATS: dict[str, FormatFacts] = {
    "csv": FormatFacts("a table with a header", (".csv",), text=_DOCUMENTS, rows=".data.csv_rows:read_csv", packs=True),
    "tsv": FormatFacts(
        "a table with a header and tabs", (".tsv",), text=_DOCUMENTS, rows=".data.csv_rows:read_tsv", packs=True
    ),
    "jsonl": FormatFacts(
        "JSON objects: one a line, or an array",
        (".jsonl", ".json", ".ndjson"),
        text=_DOCUMENTS,
        rows=".data.json_rows:read_jsonl",
        packs=True,
    ),
    "txt": FormatFacts(
        "one document", (".txt",), text=".data.text.documents:txt_documents", words=("utf-8",), packs=True
    ),  # utf-8 is RWKV-LM's name for a text file
    "binidx": FormatFacts(
        "Megatron's pair of .bin and .idx, named with or without suffix",
        (".bin", ".idx"),
        text=".data.text.documents:binidx_documents",
        tokenised=True,
    ),
    "parquet": FormatFacts("a table in columns", (".parquet",), text=_DOCUMENTS, rows=".data.arrow_rows:read_parquet"),
    "arrow": FormatFacts(
        "a table in columns, or a folder that the datasets library saved",
        (".arrow", ".feather"),
        text=_DOCUMENTS,
        rows=".data.arrow_rows:read_arrow",
    ),
    "save": FormatFacts(
        "tokenised pairs of the preparation scripts",
        (".save",),
        pairs=".data.pairs.dataset:open_save",
        tokenised=True,
    ),
    "h5": FormatFacts(
        "tokenised documents, or pairs of older programs",
        (".h5", ".hdf5"),
        text=".data.text.documents:h5_documents",
        pairs=".data.pairs.dataset:open_pair_h5",
        tells=".data.text.h5:holds_pairs",
        tokenised=True,
    ),
}


def format_of_word(word: str) -> str:
    """The format that a word of --data_type or a suffix without its dot names; "" for none."""
    found = (name for name, f in FORMATS.items() if word == name or word in f.words or f".{word}" in f.suffixes)
    return next(found, "")


def format_of_name(path: str | os.PathLike[str]) -> str:
    """The format that the suffix of a path names, behind that of a packed file; "" for none."""
    name = Path(path).name.lower()
    packed = name.endswith(PACKED)
    suffix = Path(Path(name).stem if packed else name).suffix
    found = ((name, facts) for name, facts in FORMATS.items() if facts.packs or not packed)
    return next((name for name, facts in found if suffix in facts.suffixes), "")


def refuse_other_format(path: str | os.PathLike[str], flag: str, *legal: str) -> None:
    """Raises ValueError when an output file `path` of `flag` has the suffix of another format than those that are
    written: it would be read as what it is not."""
    found = format_of_name(path)
    if found and found not in legal:
        names = " or ".join(FORMATS[name].suffixes[0] for name in legal)
        raise ValueError(f"{flag} {path}: what is written is no {found}; give a name that ends in {names}")


def names_of_formats(kind: str) -> list[str]:
    """How files that can hold `kind` (text, pairs or rated) are named, for messages: .csv, .jsonl, binidx."""
    found = {name: facts.suffixes[0] for name, facts in FORMATS.items() if kind in facts.holds}
    return [name if suffix == ".bin" else suffix for name, suffix in found.items()]
