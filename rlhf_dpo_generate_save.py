"""CSV, JSONL or parquet of preference pairs -> tokenised pairs with reference log-probabilities (.save) for DPO.

The reference scores are summed log-probabilities of exactly the tokens that are written, so after any cut.
F.save.json beside the output holds the model's hash and the arithmetic: train.py uses the scores when both are its own,
and computes them anew otherwise.
"""

import dataclasses
import logging
from collections.abc import Sequence

from src.cli import Parser, run
from src.data.pair_save import write_save
from src.data.pairs import MIXED_SEED, pair_records
from src.data.templates import TEMPLATES, check_template
from src.files import check_writable, file_hash, refuse_same_file
from src.training.answering import STRATEGY_HELP, open_model
from src.training.evaluate import score_pairs
from src.training.inputs import counted
from src.training.start import DTYPES

log = logging.getLogger("prepare")


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise preference pairs and score them with the reference model.")
    flags.add_argument("--load_model", required=True, help="the reference: the model that training starts from")
    flags.add_argument("--input_csv", required=True, help="pairs: .csv, .jsonl or .parquet")
    flags.add_argument("--output_save", default="trainset.save", help="file to write [trainset.save]")
    flags.add_argument("--target_pair_count", type=int, default=1000, help="pairs to write; rows are cycled [1000]")
    flags.add_argument("--strategy", default="auto", help=f"{STRATEGY_HELP} [auto]")
    flags.add_argument("--template", default="world", help=f"one of {', '.join(TEMPLATES)} [world]")
    flags.add_argument("--rlhf_max_corpus_len", type=int, default=0, help="cap on each part in tokens; 0 = none [0]")
    flags.add_argument("--vocab_file", default="", help="tokenizer.json or trie vocabulary; empty = World")
    flags.add_argument("--random_seed", type=int, default=MIXED_SEED, help=f"templates and shuffle [{MIXED_SEED}]")
    flags.add_switch("--skip_bad", help="count and skip bad rows instead of stopping")
    return flags


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, scores each distinct pair once, writes."""
    flags = parser().parse_args(argv)
    if flags.rlhf_max_corpus_len < 0:
        raise ValueError(f"--rlhf_max_corpus_len {flags.rlhf_max_corpus_len}: must be at least 0")
    check_template(flags.template)
    refuse_same_file(flags.input_csv, flags.output_save, "--output_save")
    check_writable(flags.output_save)
    model, tokenizer = open_model(flags.load_model, "", flags.strategy, flags.vocab_file)
    pairs, report = pair_records(
        flags.input_csv,
        tokenizer,
        flags.template,
        flags.target_pair_count,
        flags.rlhf_max_corpus_len,
        flags.random_seed,
        flags.skip_bad,
    )
    distinct = {id(pair): pair for pair in pairs}  # cycled rows are the same object
    with counted(len(distinct), "reference", shown=True) as done:
        sums, _ = score_pairs(model, list(distinct.values()), chunk=1024, progress=done)
    scores = dict(zip(distinct, sums.tolist()))
    scored = [dataclasses.replace(pair, reference=tuple(scores[id(pair)])) for pair in pairs]
    about = {
        "model": file_hash(flags.load_model),
        "reference": "sum",
        "precision": next(name for name, dtype in DTYPES.items() if dtype == model.compute_dtype),
        "storage": "none",
        "template": flags.template,
        "tokenizer": tokenizer.name,
        "max_len": flags.rlhf_max_corpus_len,
        "seed": flags.random_seed,
    }
    write_save(flags.output_save, scored, about)
    for line in report.lines():
        log.info("%s", line)
    log.info("wrote %d pairs (%d distinct) to %s", len(scored), len(distinct), flags.output_save)


if __name__ == "__main__":
    run(main)
