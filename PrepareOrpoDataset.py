"""CSV, JSONL or parquet of preference pairs -> tokenised pairs (.save) for ORPO: no model is run.

Rows are cycled until --target_pair_count pairs; the reference log-probabilities are the placeholders 0.5, 0.5. What was
read, cut and left out is printed; F.save.json beside the output says how it was made.
"""

import logging
from argparse import Namespace
from collections.abc import Sequence

from src.cli import Parser, run
from src.data.batch import PairExample
from src.data.pair_save import write_save
from src.data.pairs import MIXED_SEED, pair_records
from src.data.report import DataReport
from src.data.templates import TEMPLATES, check_template
from src.data.tokenizer import WORLD_SIZE, Tokenizer, load_tokenizer
from src.files import check_writable, refuse_same_file
from src.model.checkpoint import read_tensors
from src.model.sizes import sizes_of

log = logging.getLogger("prepare")


def add_pair_flags(flags: Parser, output: str) -> None:
    """Adds the flags of every script that turns pairs into a .save file, by default `output`."""
    flags.add_argument("--input_csv", required=True, help="pairs: .csv, .jsonl or .parquet")
    flags.add_argument("--output_save", default=output, help=f"file to write [{output}]")
    flags.add_argument("--target_pair_count", type=int, default=1000, help="pairs to write; rows are cycled [1000]")
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)} [world]")
    flags.add_argument("--rlhf_max_corpus_len", type=int, default=0, help="cap on each part in tokens; 0 = none [0]")
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")
    flags.add_argument("--random_seed", type=int, default=MIXED_SEED, help=f"templates and shuffle [{MIXED_SEED}]")
    flags.add_switch("--skip_bad", help="count and skip bad rows instead of stopping")


def check_pair_flags(flags: Namespace) -> None:
    """Refuses, before anything slow, what `tokenised` could not read or write."""
    if flags.rlhf_max_corpus_len < 0:
        raise ValueError(f"--rlhf_max_corpus_len {flags.rlhf_max_corpus_len}: must be at least 0")
    check_template(flags.template)
    refuse_same_file(flags.input_csv, flags.output_save, "--output_save")
    check_writable(flags.output_save)


def tokenised(flags: Namespace, tokenizer: Tokenizer) -> tuple[list[PairExample], DataReport]:
    """The pairs of --input_csv as the flags say, and what was read."""
    return pair_records(
        flags.input_csv,
        tokenizer,
        flags.template,
        flags.target_pair_count,
        flags.rlhf_max_corpus_len,
        flags.random_seed,
        flags.skip_bad,
    )


def write_pairs(
    flags: Namespace, tokenizer: Tokenizer, pairs: Sequence[PairExample], report: DataReport, about: dict
) -> None:
    """Writes --output_save and its sidecar (`about` says what the reference is), and logs the report."""
    about = about | {
        "template": flags.template,
        "tokenizer": tokenizer.name,
        "max_len": flags.rlhf_max_corpus_len,
        "seed": flags.random_seed,
    }
    write_save(flags.output_save, pairs, about)
    for line in report.lines():
        log.info("%s", line)
    log.info("wrote %d pairs to %s", len(pairs), flags.output_save)


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise preference pairs for ORPO without running a model.")
    flags.add_argument("--load_model", default="", help="checkpoint whose vocabulary size is used; it is not run")
    flags.add_argument("--vocab_size", type=int, default=0, help="vocabulary size if no model is given [65536]")
    add_pair_flags(flags, "orpotest.save")
    return flags


def vocabulary_size(model: str, given: int) -> int:
    """The checkpoint's vocabulary size, or the flag's, or World's; ValueError when checkpoint and flag disagree."""
    if model in ("", "0"):
        return given or WORLD_SIZE
    found = sizes_of(read_tensors(model)).vocab_size
    if given and given != found:
        raise ValueError(f"--vocab_size {given}, but {model} has a vocabulary of {found}")
    return found


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, writes."""
    flags = parser().parse_args(argv)
    check_pair_flags(flags)
    tokenizer = load_tokenizer(vocabulary_size(flags.load_model, flags.vocab_size), flags.vocab_file or None)
    pairs, report = tokenised(flags, tokenizer)
    write_pairs(flags, tokenizer, pairs, report, {"model": None, "reference": None})


if __name__ == "__main__":
    run(main)
