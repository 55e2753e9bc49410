"""From a batch to per-token scores: packed documents in one pass, pairs with the prompt run once, or all of it piece by
piece.

Legend: T tokens of a packed row, n pairs, P prompt tokens, A answer tokens, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairBatch, TextBatch
from rwkv_rlhf.distributed.ranks import is_sharded
from rwkv_rlhf.losses import loss_settings, step_loss
from rwkv_rlhf.losses.kinds import Loss, Metrics
from rwkv_rlhf.losses.pairs import PairScores, pair_scores
from rwkv_rlhf.losses.tokens import TokenScores, token_scores
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.infinite_context import Pieces, piecewise


def text_hidden(model: RWKV, batch: TextBatch) -> Tensor:
    """Documents packed in one row, each from a zero state -> hidden (T, C)."""
    if not batch.tokens.numel():  # the graph, with gradients of 0, is as on other ranks, which would wait for it
        return model(batch.tokens.new_zeros(1, 1))[0][0][:0]
    hidden, _ = model(batch.tokens[None], None, batch.starts)
    return hidden[0]


def pair_hidden(model: RWKV, batch: PairBatch) -> Tensor:
    """Prompts run once; each final state is forked to its answers (two, or one of a rated batch) -> hidden (A, C).

    The gradient of every answer flows back through the fork into the prompt.
    """
    _, state = model(batch.prompts[None], None, batch.prompt_starts)
    if state is not None:
        prompts, answers = batch.prompt_starts.numel() - 1, batch.starts.numel() - 1
        state = state.select(torch.arange(prompts, device=batch.answers.device).repeat_interleave(answers // prompts))
    hidden, _ = model(batch.answers[None], state, batch.starts)
    if not batch.prompts.numel() and is_sharded(model):  # the model runs twice on every rank
        return hidden[0] + model(batch.prompts.new_zeros(1, 1))[0][0][:0].sum()
    return hidden[0]


def batch_hidden(model: RWKV, batch: TextBatch | PairBatch) -> Tensor:
    """Hidden states of the tokens that `batch.targets` belong to."""
    return pair_hidden(model, batch) if isinstance(batch, PairBatch) else text_hidden(model, batch)


def cut(batch: TextBatch | PairBatch, length: int) -> Pieces:
    """The rows of a batch in pieces of at most `length` tokens; answers begin from the end of their prompt."""
    pieces = Pieces(length)
    if isinstance(batch, PairBatch):
        ends = pieces.add_row(batch.prompts, batch.prompt_starts, keep=True, scored=False)
        each = (batch.starts.numel() - 1) // len(ends)  # two answers to a prompt, or one
        pieces.add_row(batch.answers, batch.starts, begin=[slot for slot in ends for _ in range(each)])
    else:
        pieces.add_row(batch.tokens, batch.starts)
    return pieces


def long_scores(
    model: RWKV, batch: PairBatch, length: int, *, chunk: int, required_stats: dict[str, bool], **how: bool
) -> TokenScores:
    """`token_scores` of the answers of a batch that runs in pieces of `length` tokens; `how` goes to `piecewise`."""

    def score(hidden: Tensor, here: slice) -> tuple[Tensor, ...]:
        scores = token_scores(model.head, hidden, batch.targets[here], chunk=chunk, **required_stats)
        return tuple(x for x in scores if x is not None)

    found = iter(piecewise(model, cut(batch, length), score, **how))
    logp = next(found)
    asked = (
        required_stats.get(name) for name in ("want_mean", "want_max", "want_square")
    )  # in the order of the fields
    return TokenScores(logp, *(next(found) if want else None for want in asked))


def long_text_loss(
    model: RWKV, batch: TextBatch, loss: Loss, config: Any, length: int, **how: bool
) -> tuple[Tensor, Metrics]:
    """`step_loss` of text that runs in pieces of `length` tokens; a sum over tokens, so one number a piece is kept."""
    names: list[str] = []

    def score(hidden: Tensor, here: slice) -> tuple[Tensor, ...]:
        value, metrics = step_loss(loss, model.head, hidden, batch.part(here), config)
        names[:] = metrics
        return tuple(x[None] for x in (value, *metrics.values()))

    value, *metrics = (x.sum() for x in piecewise(model, cut(batch, length), score, sums=True, **how))
    return value, {name: x.detach() for name, x in zip(names, metrics, strict=True)}


def batch_loss(model: RWKV, batch: TextBatch | PairBatch, loss: Loss, config: Any) -> tuple[Tensor, Metrics]:
    """(objective, metrics) of one micro-batch, sums over its trained tokens or pairs.

    With `config.chunk` the rows run in pieces of so many tokens, with the gradient of one long pass (or, with
    `config.bptt` truncated, without any across the cuts).
    """
    if not config.chunk or (isinstance(batch, TextBatch) and not len(batch.tokens)):
        return step_loss(loss, model.head, batch_hidden(model, batch), batch, config)
    how = {"truncated": config.bptt == "truncated", "offload": config.state_offload}
    if isinstance(batch, TextBatch):
        return long_text_loss(model, batch, loss, config, config.chunk, **how)
    settings = loss_settings(loss, config)
    scores = long_scores(
        model, batch, config.chunk, chunk=config.head_chunk, required_stats=loss.required_stats(**settings), **how
    )
    return loss.from_scores(scores, batch, **settings)


@torch.no_grad()
def answer_logp(model: RWKV, batch: PairBatch, chunk: int, length: int = 0) -> Tensor:
    """(A,) log-probabilities of the answers' tokens, without a graph; in pieces of `length` tokens if not 0."""
    if length:
        return long_scores(model, batch, length, chunk=chunk, required_stats={}).logp
    return token_scores(model.head, pair_hidden(model, batch), batch.targets, chunk=chunk).logp


def pair_sums(model: RWKV, batch: PairBatch, chunk: int, length: int = 0) -> PairScores:
    """Summed log-probabilities of both answers of each pair; arguments as `answer_logp`."""
    return pair_scores(answer_logp(model, batch, chunk, length), batch.targets, batch.starts)
