"""Documents and chats + a teacher model -> an .h5 with its largest logits, for --distillation 1 --train_data_file F.h5.

Documents run together, packed by their recurrent states; a long one is carried on from chunk to chunk. Each batch is
on the disk before the next one starts (OUT.part beside the output), so a run that was stopped goes on where it was,
with no document lost or twice, and its file is the one of a run that was not stopped.
"""

import hashlib
import logging
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rwkv_rlhf.commands.document_files import check_document_flags, count_lines, examples_of
from rwkv_rlhf.commands.parsers.distillation_h5 import parser
from rwkv_rlhf.data.batch import TextBatch, TextExample, TopK
from rwkv_rlhf.data.grouping import group_by_tokens
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import content_of
from rwkv_rlhf.data.text.h5 import writing
from rwkv_rlhf.data.text.teacher_log import TeacherLog
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.precision import NAMES
from rwkv_rlhf.scoring.finite import refuse_not_finite
from rwkv_rlhf.scoring.teacher import top_logits
from rwkv_rlhf.settings.counted import counted

log = logging.getLogger("teacher")

HEAD_CHUNK = 1024


def batches(examples: Iterable[TextExample], most: int) -> Iterator[list[TextExample]]:
    """Neighbouring documents together up to `most` tokens; a longer document alone."""
    return group_by_tokens(examples, lambda example: len(example.tokens), most)


def with_teacher(model: RWKV, row: Sequence[TextExample], k: int, chunk: int) -> list[TextExample]:
    """The documents of one row with the teacher's K largest logits after each of their tokens."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(np.concatenate([e.tokens for e in row]).astype(np.int64)).to(device)
    ends = np.cumsum([len(e.tokens) for e in row]).tolist()
    # every token is asked about, so every target counts as trained; which they are does not matter
    batch = TextBatch(tokens, tokens, torch.tensor([0, *ends]), 1.0)
    found = top_logits(model, batch, k, head_chunk=HEAD_CHUNK, chunk=chunk)
    refuse_not_finite("a logit of the teacher", found.lse, model)
    top = TopK(found.values.float().cpu().numpy(), found.indices.cpu().numpy(), found.lse.float().cpu().numpy())
    return [TextExample(e.tokens, e.mask, top.rows(end - len(e.tokens), end)) for e, end in zip(row, ends)]


def source_of(flags: Namespace, model: RWKV, tokenizer: str) -> dict[str, Any]:
    """All that the logits depend on, for the unfinished work and for the file's attributes."""
    return {
        "model": file_hash(flags.load_model),
        "adapter": file_hash(flags.load_adapter) if flags.load_adapter else "",
        "input": hashlib.sha256(content_of(flags.input_folder).encode()).hexdigest(),
        "tokenizer": tokenizer,
        "vocab_size": model.sizes.vocab_size,
        "precision": NAMES[model.compute_dtype],
        **{
            name: getattr(flags, name)
            for name in ("top_k", "batch_tokens", "template", "random_seed", "format", "thinking")
        },
        **{name: int(getattr(flags, name)) for name in ("train_on_prompt", "skip_bad")},
    }


def main(argv: Sequence[str]) -> None:
    """Reads, tokenises, asks the teacher batch by batch, writes."""
    flags = parser().parse_args(argv)
    files = check_document_flags(flags)
    model, tokenizer = open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file)
    if flags.top_k > model.sizes.vocab_size:
        raise ValueError(f"--top_k {flags.top_k} is more than the {model.sizes.vocab_size} tokens of the vocabulary")
    about = source_of(flags, model, tokenizer.name)
    kept = TeacherLog(f"{flags.output_parquet}.part", about, flags.top_k)
    if kept.batches:
        log.info("%d documents are kept from an earlier run; going on after them", kept.documents)
    report = DataReport(flags.input_folder, skip_bad=flags.skip_bad)
    with progress_bar(count_lines(files), "documents", True) as done:
        rows = batches(examples_of(flags, tokenizer, report), flags.batch_tokens)
        for number, row in enumerate(rows):
            if number >= kept.batches:
                kept.append(with_teacher(model, row, flags.top_k, flags.batch_tokens))
            done(len(row))
    if not kept.documents:
        kept.remove()
        raise ValueError(f"{flags.input_folder}: holds no text ({counted(report.rows, 'row')} read)")
    with writing(flags.output_parquet, about, flags.top_k) as out:
        for batch in kept:
            out.add(batch)
    assert out.documents == report.examples == kept.documents
    kept.remove()
    for line in report.lines():
        log.info("%s", line)
    log.info(
        "wrote %d documents, %d tokens with %d logits each to %s",
        *(out.documents, out.tokens, flags.top_k, flags.output_parquet),
    )
