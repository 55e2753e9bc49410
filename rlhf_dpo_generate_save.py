"""CSV, JSONL or parquet of preference pairs -> tokenised pairs with reference log-probabilities (.save) for DPO.

The reference scores are summed log-probabilities of exactly the tokens that are written, so after any cut.
F.save.json beside the output holds the model's hash and the arithmetic: train.py uses the scores when both are its own,
and computes them anew otherwise.
"""

import dataclasses
import logging
from collections.abc import Sequence

from PrepareOrpoDataset import add_pair_flags, check_pair_flags, tokenised, write_pairs
from src.cli import Parser, run
from src.files import file_hash
from src.training.answering import STRATEGY_HELP, open_model
from src.training.evaluate import score_pairs
from src.training.inputs import counted
from src.training.start import DTYPES

log = logging.getLogger("prepare")


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Tokenise preference pairs and score them with the reference model.")
    flags.add_argument("--load_model", required=True, help="the reference: the model that training starts from")
    flags.add_argument("--strategy", default="auto", help=f"{STRATEGY_HELP} [auto]")
    add_pair_flags(flags, "trainset.save")
    return flags


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, scores each distinct pair once, writes."""
    flags = parser().parse_args(argv)
    check_pair_flags(flags)
    model, tokenizer = open_model(flags.load_model, "", flags.strategy, flags.vocab_file)
    pairs, report = tokenised(flags, tokenizer)
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
    }
    write_pairs(flags, tokenizer, scored, report, about)
    log.info("%d of them distinct, each scored once", len(distinct))


if __name__ == "__main__":
    run(main)
