"""CSV, JSONL or parquet of preference pairs -> tokenised pairs (.save) for ORPO: no model is run.

Rows are cycled until --target_pair_count pairs; the reference log-probabilities are the placeholders 0.5, 0.5. What was
read, cut and left out is printed; F.save.json beside the output says how it was made.
"""

from collections.abc import Sequence

from rwkv_rlhf.commands.flag_values import vocabulary_size
from rwkv_rlhf.commands.pair_files import check_pair_flags, tokenised, write_pairs
from rwkv_rlhf.commands.parsers.prepare_pairs import parser
from rwkv_rlhf.data.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, writes."""
    flags = parser().parse_args(argv)
    check_pair_flags(flags)
    tokenizer = load_tokenizer(vocabulary_size(flags.load_model, flags.vocab_size), flags.vocab_file or None)
    parts, report = tokenised(flags, tokenizer)
    write_pairs(flags, tokenizer, parts, report, {"model": None, "reference": None})
