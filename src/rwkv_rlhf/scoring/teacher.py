"""A teacher's largest logits: computed while training runs, or beforehand for a file.

Documents are packed into one row and run together by their recurrent states, a chunk at a time, so that a row of any
length costs the memory of one chunk.

Legend: T tokens of a row, S documents in it, M rows asked for, K logits kept of each, C width, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.loading import BuildOptions, as_trained, load_model
from rwkv_rlhf.data.batch import TextBatch
from rwkv_rlhf.losses.head import open_head
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.ops.logprob import row_stats
from rwkv_rlhf.ops.product_ways import PLAIN, Ways
from rwkv_rlhf.precision import DTYPES, device_for, wide_dtype
from rwkv_rlhf.scoring.forward import in_chunks
from rwkv_rlhf.scoring.infinite_context import run_in_chunks
from rwkv_rlhf.settings.config import Config

log = logging.getLogger(__name__)

CHUNK = 4096  # tokens that run together


class TopLogits(NamedTuple):
    """The K largest logits of each row, largest first: values (M, K) float32 (float64 of a float64 model), indices
    (M, K) int64; lse (M,) is the log-sum-exp of all V."""

    values: Tensor
    indices: Tensor
    lse: Tensor


@torch.no_grad()
def largest_logits(model: RWKV, hidden: Tensor, k: int, head_chunk: int) -> TopLogits:
    """The K largest logits of `hidden` (M, C), through the head in chunks of rows."""
    found = []
    run = open_head(model.head, hidden, head_chunk)
    for chunk in run.chunks:
        logits = run.logits(chunk)
        no_targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        lse = row_stats(logits, no_targets, checked=True).lse
        values, indices = logits.topk(k, dim=1)
        found.append((values.to(lse.dtype), indices, lse))
    if not found:
        wide = wide_dtype(hidden.dtype)
        empty = hidden.new_empty(0, k, dtype=wide)
        return TopLogits(empty, empty.long(), empty.new_empty(0))
    return TopLogits(*(torch.cat(parts) for parts in zip(*found)))


@torch.no_grad()
def top_logits(model: RWKV, batch: TextBatch, k: int, *, head_chunk: int, chunk: int = CHUNK) -> TopLogits:
    """The K largest logits after each of a batch's tokens (T) whose target is trained, 0 at the others.

    The row runs in chunks of `chunk` tokens; documents that cross a border are carried on, so the values are those of
    a single pass to float error.
    """
    device = batch.targets.device
    if not len(batch.targets):
        nothing = torch.empty(0, model.sizes.n_embd, dtype=model.compute_dtype, device=device)
        return largest_logits(model, nothing, k, head_chunk)

    def score(hidden: Tensor, span: slice) -> dict[str, Tensor]:
        rows = batch.trained.chunk(span).on(device)
        found = largest_logits(model, hidden if rows is None else hidden[rows], k, head_chunk)._asdict()
        if rows is None:
            return found
        return {name: x.new_zeros(len(hidden), *x.shape[1:]).index_copy_(0, rows, x) for name, x in found.items()}

    return TopLogits(**run_in_chunks(model, in_chunks(batch, chunk), score))


class Teacher:
    """--teacher_model: a second model, frozen, that gives its opinion of every batch before the student's step."""

    def __init__(self, model: RWKV, k: int, head_chunk: int) -> None:
        self.model, self.k, self.head_chunk = model, k, head_chunk

    def __call__(self, batch: TextBatch) -> TextBatch:
        """The batch with the teacher's logits at its trained positions, 0 elsewhere."""
        found = top_logits(self.model, batch, self.k, head_chunk=self.head_chunk)
        return batch.having(top_values=found.values, top_indices=found.indices, top_lse=found.lse)


def open_teacher(config: Config, vocab_size: int, ways: Ways = PLAIN) -> Teacher | None:
    """The teacher that --teacher_model names, in the precision of the run; None without one. ways: of the student.

    Raises ValueError for a file that is no model, another vocabulary than the student's, or more logits than it has.
    """
    path = config.teacher_model
    if not config.loss_facts.teacher or not path:
        return None
    model, _ = load_model(
        path,
        BuildOptions(
            DTYPES[config.precision], device=device_for(config.accelerator), layout=as_trained(path, "none"), ways=ways
        ),
    )
    found = model.sizes.vocab_size
    if found != vocab_size:
        raise ValueError(f"--teacher_model {path} has a vocabulary of {found}, the model one of {vocab_size}")
    if "top_k" in config.given and config.top_k > found:
        raise ValueError(f"--top_k {config.top_k} is more than the {found} tokens of the vocabulary")
    model.requires_grad_(False).eval()
    log.info("teacher: %s, its %d largest logits of each token", path, min(config.top_k, found))
    return Teacher(model, min(config.top_k, found), config.head_chunk)
