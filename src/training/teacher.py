"""A teacher's largest logits: computed while training runs, or beforehand for a file.

Documents are packed into one row and run together by their recurrent states, a window at a time, so that a row of any
length costs the memory of one window.

Legend: T tokens of a row, S documents in it, M rows asked for, K logits kept of each, C width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.config import Config
from src.data.batch import IGNORE, TextBatch
from src.losses.head import open_head
from src.model.checkpoint import load_model
from src.model.rwkv import RWKV
from src.model.state import LayerState, State
from src.ops.logprob import row_stats
from src.training.answering import with_masters
from src.training.start import DTYPES, device_of

log = logging.getLogger(__name__)

WINDOW = 4096  # tokens that run together


class TopLogits(NamedTuple):
    """The K largest logits of each row, largest first: values (M, K) float32 (float64 of a float64 model), indices
    (M, K) int64; lse (M,) is the log-sum-exp of all V."""

    values: Tensor
    indices: Tensor
    lse: Tensor


def _first_continued(state: State, segments: int) -> State:
    """The state of `segments` documents of which the first goes on from the last row of `state`, the others begin."""

    def part(tensor: Tensor) -> Tensor:
        rows = tensor.new_zeros(segments, *tensor.shape[1:])
        rows[0] = tensor[-1]
        return rows

    return State(LayerState(*map(part, layer)) for layer in state)


@torch.no_grad()
def packed_hidden(
    model: RWKV, tokens: Tensor, starts: Tensor, window: int = WINDOW
) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, hidden (end - begin, C)) of a packed row `tokens` (T,) int64 with `starts` (S+1,), in windows.

    Each document runs from a zero state; one that crosses the border of a window is carried on, so the values are those
    of a single pass to float error.
    """
    state, length = None, tokens.numel()
    bounds = starts.tolist()
    for begin in range(0, length, window):
        end = min(length, begin + window)
        # borders of documents inside of this window; the first segment goes on unless a document begins at `begin`
        cuts = sorted({begin, end, *(b for b in bounds if begin < b < end)})
        inner = torch.tensor(cuts, dtype=torch.int64, device=starts.device) - begin
        before = None
        if state is not None and begin not in bounds:
            before = _first_continued(state, len(cuts) - 1)
        hidden, state = model(tokens[None, begin:end], before, inner)
        yield begin, end, hidden[0]


@torch.no_grad()
def largest_logits(model: RWKV, hidden: Tensor, k: int, chunk: int) -> TopLogits:
    """The K largest logits of `hidden` (M, C), through the head in chunks of rows."""
    found = []
    run = open_head(model.head, hidden, chunk)
    for part in run.parts:
        logits = run.logits(part)
        lse = row_stats(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)).lse
        values, indices = logits.topk(k, dim=1)
        found.append((values.to(lse.dtype), indices, lse))
    if not found:
        empty = hidden.new_empty(0, k, dtype=torch.float32)
        return TopLogits(empty, empty.long(), empty.new_empty(0))
    return TopLogits(*(torch.cat(parts) for parts in zip(*found)))


class Teacher:
    """--teacher_model: a second model, frozen, that gives its opinion of every batch before the student's step."""

    def __init__(self, model: RWKV, k: int, chunk: int) -> None:
        self.model, self.k, self.chunk = model, k, chunk

    def __call__(self, batch: TextBatch) -> TextBatch:
        """The batch with the teacher's logits at its trained positions, 0 elsewhere."""
        trained = batch.targets != IGNORE
        nothing = self.model.head.weight.new_empty(0, self.model.sizes.n_embd)
        parts, rows = [largest_logits(self.model, nothing, self.k, self.chunk)], [batch.tokens[:0]]
        for begin, end, hidden in packed_hidden(self.model, batch.tokens, batch.starts):
            here = trained[begin:end].nonzero()[:, 0]
            parts.append(largest_logits(self.model, hidden[here], self.k, self.chunk))
            rows.append(here + begin)
        place, found = torch.cat(rows), {}
        for name, value in zip(TopLogits._fields, zip(*parts)):
            joined = torch.cat(value)
            spread = joined.new_zeros(len(batch.tokens), *joined.shape[1:])
            found[f"top_{name}"] = spread.index_copy_(0, place, joined)
        return dataclasses.replace(batch, **found)


def open_teacher(config: Config, vocab_size: int) -> Teacher | None:
    """The teacher that --teacher_model names, in the precision of the run; None without one.

    Raises ValueError for a file that is no model, another vocabulary than the student's, or more logits than it has.
    """
    path = config.teacher_model
    if config.loss != "distillation" or not path:
        return None
    model, _ = load_model(
        path, compute_dtype=DTYPES[config.precision], device=device_of(config), layout=with_masters(path)
    )
    found = model.sizes.vocab_size
    if found != vocab_size:
        raise ValueError(f"--teacher_model {path} has a vocabulary of {found}, the model one of {vocab_size}")
    if "top_k" in config.given and config.top_k > found:
        raise ValueError(f"--top_k {config.top_k} is more than the {found} tokens of the vocabulary")
    model.requires_grad_(False).eval()
    log.info("teacher: %s, its %d largest logits of each token", path, min(config.top_k, found))
    return Teacher(model, min(config.top_k, found), config.head_chunk)
