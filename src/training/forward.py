"""From a batch to per-token scores: packed documents in one pass, pairs with the prompt run once.

Legend: T tokens of a packed row, n pairs, P prompt tokens, A answer tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.data.batch import PairBatch, TextBatch
from src.losses.pairs import PairScores, pair_scores
from src.losses.tokens import token_scores
from src.model.rwkv import RWKV


def text_hidden(model: RWKV, batch: TextBatch) -> Tensor:
    """Documents packed in one row, each from a zero state -> hidden (T, C)."""
    hidden, _ = model(batch.tokens[None], None, batch.starts)
    return hidden[0]


def pair_hidden(model: RWKV, batch: PairBatch) -> Tensor:
    """Prompts run once; each final state is forked to its answers (two, or one of a rated batch) -> hidden (A, C).

    The gradient of every answer flows back through the fork into the prompt.
    """
    _, state = model(batch.prompts[None], None, batch.prompt_starts)
    if state is not None:
        prompts, answers = batch.prompt_starts.numel() - 1, batch.starts.numel() - 1
        state = state.index(torch.arange(prompts, device=batch.answers.device).repeat_interleave(answers // prompts))
    hidden, _ = model(batch.answers[None], state, batch.starts)
    return hidden[0]


@torch.no_grad()
def pair_sums(model: RWKV, batch: PairBatch, chunk: int) -> PairScores:
    """Summed log-probabilities of both answers of each pair, without a graph."""
    scores = token_scores(model.head, pair_hidden(model, batch), batch.targets, chunk=chunk)
    return pair_scores(scores.logp, batch.targets, batch.starts)
