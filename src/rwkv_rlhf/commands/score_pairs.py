"""CSV, JSONL or parquet of preference pairs -> tokenised pairs with reference log-probabilities (.save) for DPO.

The reference scores are summed log-probabilities of exactly the tokens that are written, so after any cut.
F.save.json beside the output holds the model's hash and the arithmetic: train.py uses the scores when both are its own,
and computes them anew otherwise. Scores are kept in F.save.part while they are computed: the same command goes on
after a kill.
"""

import dataclasses
import logging
from collections.abc import Sequence

from rwkv_rlhf.commands.pair_files import check_pair_flags, tokenised, write_pairs
from rwkv_rlhf.commands.parsers.score_pairs import parser
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.generation.opening import open_model, storage_of
from rwkv_rlhf.precision import NAMES
from rwkv_rlhf.scoring.kept_scores import KeptScores
from rwkv_rlhf.scoring.reference import reference_key

log = logging.getLogger("prepare")


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, scores each distinct pair once, writes."""
    flags = parser().parse_args(argv)
    check_pair_flags(flags)
    storage = storage_of(flags.strategy, flags.quant_mode)
    model, tokenizer = open_model(flags.load_model, "", flags.strategy, flags.vocab_file, quant=storage)
    parts, report = tokenised(flags, tokenizer)
    distinct = {id(pair): pair for pairs in parts for pair in pairs}  # cycled rows are the same object
    model_hash = file_hash(flags.load_model)
    arithmetic = f"{model.compute_dtype} {model.emb.weight.device} {storage}"
    key = reference_key(model_hash, list(distinct.values()), arithmetic)
    kept = KeptScores(f"{flags.output_save}.part", key)
    with progress_bar(len(distinct), "reference", shown=True) as done:
        sums = kept.score(model, list(distinct.values()), progress=done)
    scores = dict(zip(distinct, sums.tolist()))
    scored = [[dataclasses.replace(pair, reference=tuple(scores[id(pair)])) for pair in pairs] for pairs in parts]
    about = {
        "model": model_hash,
        "reference": "sum",
        "precision": NAMES[model.compute_dtype],
        "storage": storage,
    }
    write_pairs(flags, tokenizer, scored, report, about)
    kept.forget()
    log.info("%d of them distinct, each scored once", len(distinct))
