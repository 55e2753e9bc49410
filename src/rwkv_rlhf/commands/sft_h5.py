"""Documents and chats (docs/data.md) -> tokenised documents in HDF5 for --sft 1 --train_data_file F.h5.

The file holds what train.py would make of the rows themselves: `{"text"}` byte for byte, closed by token 0; chats by
the template, with a mask so that the assistant's turns are learnt only. The older programs read it too (their dataset
`tokens`); they know no mask and learn every token.
"""

import logging
from collections.abc import Sequence
from itertools import islice

from rwkv_rlhf.commands.document_files import check_document_flags, count_lines, examples_of
from rwkv_rlhf.commands.flag_values import vocabulary_size
from rwkv_rlhf.commands.parsers.sft_h5 import parser
from rwkv_rlhf.data.encoders import Encoders, workers_for
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.text.h5 import writing
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.settings.counted import counted

log = logging.getLogger("sft")

BATCH = 1000  # documents written at a time


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
    workers = workers_for(flags.input_folder, flags.workers)
    with (
        Encoders(tokenizer, vocab_file=flags.vocab_file, workers=workers) as encoders,
        writing(flags.output_parquet, about) as out,
        progress_bar(count_lines(files), "documents", True) as done,
    ):
        examples = examples_of(flags, tokenizer, report, encoders)
        while batch := list(islice(examples, BATCH)):
            out.add(batch)
            done(len(batch))
        if not out.documents:
            raise ValueError(f"{flags.input_folder}: holds no text to train on ({counted(report.rows, 'row')} read)")
    for line in report.lines():
        log.info("%s", line)
    log.info("wrote %d documents, %d tokens to %s", out.documents, out.tokens, flags.output_parquet)
