"""What the commands that make `.save` files of preference pairs have in common: flags, reading, splitting, writing."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.commands.flag_values import reading_of
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.pairs.save import write_save
from rwkv_rlhf.data.pairs.tokenising import PairOptions, PairTokeniser
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import check_writable

log = logging.getLogger("prepare")

PARTS = ("train", "valid", "test")


def check_pair_flags(flags: Namespace) -> None:
    """Refuses, before anything slow, what `tokenised` could not read or write."""
    find_templates(flags.template)
    for path in outputs(flags):
        refuse_sources(flags.input_csv, path, "--output_save")
        check_writable(path)


def shares_of(text: str) -> list[float]:
    """The shares of --split, [] for none. Raises ValueError for other than two or three that add up to 1."""
    try:
        shares = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        shares = [0.0]
    if shares and (len(shares) not in (2, 3) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6):
        raise ValueError(f"--split {text}: two or three shares above 0 that add up to 1, e.g. 0.8,0.1,0.1")
    return shares


def outputs(flags: Namespace) -> list[Path]:
    """The files to write: --output_save, or with --split one for each part.

    trainset.save has validset.save and testset.save beside it, as in the RWKV-5 recipe; pairs.save becomes
    pairs-train.save, pairs-valid.save, pairs-test.save.
    """
    path, shares = Path(flags.output_save), shares_of(flags.split)
    if not shares:
        return [path]
    parts = PARTS[: len(shares)]
    if "train" in path.stem:
        return [path.with_name(path.name.replace("train", part)) for part in parts]
    return [path.with_stem(f"{path.stem}-{part}") for part in parts]


def tokenised(flags: Namespace, tokenizer: Tokenizer) -> tuple[list[list[PairExample]], DataReport]:
    """The pairs of --input_csv as the flags say, one list for each file of `outputs`, and what was read."""
    cap, seed = flags.rlhf_max_corpus_len, flags.random_seed
    options = PairOptions(flags.template, cap, seed, flags.skip_bad, flags.drop_ties, reading_of(flags))
    tokeniser = PairTokeniser(flags.input_csv, tokenizer, options)
    if shares := shares_of(flags.split):
        return tokeniser.parts(shares, flags.target_pair_count), tokeniser.report
    return [tokeniser.pairs(flags.target_pair_count)], tokeniser.report


def write_pairs(
    flags: Namespace,
    tokenizer: Tokenizer,
    parts: Sequence[Sequence[PairExample]],
    report: DataReport,
    about: dict[str, Any],
) -> None:
    """Writes each part and its sidecar (`about` says what the reference is), and logs the report."""
    about = about | {
        "template": flags.template,
        "tokenizer": tokenizer.name,
        "max_len": flags.rlhf_max_corpus_len,
        "seed": flags.random_seed,
    }
    for line in report.lines():
        log.info("%s", line)
    for path, pairs in zip(outputs(flags), parts, strict=True):
        write_save(path, pairs, about)
        log.info("wrote %d pairs to %s", len(pairs), path)
