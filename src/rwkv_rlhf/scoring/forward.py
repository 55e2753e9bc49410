"""From a batch to its loss or its scores: packed documents in one pass, prompts once before their answers, or all of it
chunk by chunk.

Legend: T tokens of a packed row, n pairs, P prompt tokens, A answer tokens, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rlhf.data.batch import AnswerBatch, Batch, TextBatch
from rwkv_rlhf.distributed.ranks import is_sharded
from rwkv_rlhf.layers.scalar_head import scalars
from rwkv_rlhf.losses.kinds import Loss, LossValue
from rwkv_rlhf.losses.pairs import PairScores, pair_scores
from rwkv_rlhf.losses.tokens import LOGP_ONLY, RequiredStats, TokenScores, token_scores
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.infinite_context import EXACT, ChunkedRows, ChunkOptions, run_in_chunks
from rwkv_rlhf.settings.config import Config

OBJECTIVE = "objective"  # among the numbers of a chunk of text; no metric has this name


def text_hidden(model: RWKV, batch: TextBatch) -> Tensor:
    """Documents packed in one row, each from a zero state -> hidden (T, C)."""
    if not batch.tokens.numel():  # the graph, with gradients of 0, is as on other ranks, which would wait for it
        return _no_hidden(model, batch.tokens)
    hidden: Tensor = model(batch.tokens[None], None, batch.segments, keep_state=False)[0]
    return hidden[0]


def answer_hidden(model: RWKV, batch: AnswerBatch) -> Tensor:
    """Prompts run once; each final state is forked to its answers -> hidden (A, C).

    The gradient of every answer flows back through the fork into the prompt.
    """
    _, state = model(batch.prompts[None], None, batch.prompt_segments)
    if state is not None:
        prompts = torch.arange(len(batch.prompt_segments) - 1, device=batch.answers.device)
        state = state.select(prompts.repeat_interleave(batch.answers_per_prompt()))
    hidden: Tensor = model(batch.answers[None], state, batch.segments, keep_state=False)[0]
    if not batch.prompts.numel() and is_sharded(model):  # the model runs twice on every rank
        return hidden[0] + _no_hidden(model, batch.prompts).sum()
    return hidden[0]


def _no_hidden(model: RWKV, tokens: Tensor) -> Tensor:
    """Hidden states (0, C) of no token, with the graph of a run."""
    hidden: Tensor = model(tokens.new_zeros(1, 1), keep_state=False)[0]
    return hidden[0][:0]


def batch_hidden(model: RWKV, batch: Batch) -> Tensor:
    """Hidden states of the tokens that `batch.targets` belong to."""
    return answer_hidden(model, batch) if isinstance(batch, AnswerBatch) else text_hidden(model, batch)


def in_chunks(batch: Batch, chunk: int) -> ChunkedRows:
    """The rows of a batch in chunks of at most `chunk` tokens; answers begin from the end of their prompt."""
    rows = ChunkedRows(chunk)
    if isinstance(batch, AnswerBatch):
        ends = rows.add(batch.prompts, batch.prompt_segments, keep=True, scored=False)
        rows.add(
            batch.answers, batch.segments, begin=[slot for slot in ends for _ in range(batch.answers_per_prompt())]
        )
    else:
        rows.add(batch.tokens, batch.segments)
    return rows


def batch_loss(model: RWKV, batch: Batch, loss: Loss[Any], config: Config) -> LossValue:
    """The loss of one micro-batch of its kind, a sum over trained tokens, pairs or answers.

    With `config.chunk` the rows run in chunks of so many tokens, with the gradient of one long pass (or, with
    `config.bptt` truncated, without any across their borders).
    """
    if not config.chunk or not len(batch.targets):
        scalar = model.scalar_head(loss.facts.scalar_head)
        return loss.from_hidden(model.head, batch_hidden(model, batch), batch, config, scalar)
    how = ChunkOptions(truncated=config.bptt == "truncated", offload=config.state_offload)
    if isinstance(batch, TextBatch):
        return chunked_text_loss(model, batch, loss, config, how)
    stats = loss.required_stats(config)
    scalar, temperature = model.scalar_head(loss.facts.scalar_head), loss.temperature(config)
    scores = chunked_scores(
        model, batch, config.chunk, stats, how, scalar=scalar, temperature=temperature, head_chunk=config.head_chunk
    )
    return loss(scores, batch, config)


def chunked_text_loss(model: RWKV, batch: TextBatch, loss: Loss[Any], config: Config, how: ChunkOptions) -> LossValue:
    """`batch_loss` of text in chunks: a sum over tokens, so one number of each chunk is kept."""

    def score(hidden: Tensor, span: slice) -> dict[str, Tensor]:
        value, metrics = loss.from_hidden(model.head, hidden, batch.chunk(span), config)
        return {name: amount[None] for name, amount in (metrics | {OBJECTIVE: value}).items()}

    found = run_in_chunks(model, in_chunks(batch, config.chunk), score, how._replace(sums=True))
    totals = {name: amounts.sum() for name, amounts in found.items()}
    value = totals.pop(OBJECTIVE)
    return LossValue(value, {name: total.detach() for name, total in totals.items()})


def chunked_scores(
    model: RWKV,
    batch: AnswerBatch,
    chunk: int,
    stats: RequiredStats = LOGP_ONLY,
    how: ChunkOptions = EXACT,
    *,
    scalar: nn.Module | None = None,
    head_chunk: int,
    temperature: float = 1.0,
) -> TokenScores:
    """`token_scores` of the answers of a batch that runs in chunks of `chunk` tokens."""

    def score(hidden: Tensor, span: slice) -> dict[str, Tensor]:
        found = token_scores(
            model.head,
            hidden,
            batch.targets[span],
            stats,
            scalar=scalar,
            temperature=temperature,
            head_chunk=head_chunk,
            trained=batch.trained.chunk(span),
        )
        return found.present()

    return TokenScores(**run_in_chunks(model, in_chunks(batch, chunk), score, how))


@torch.no_grad()
def answer_logp(
    model: RWKV, batch: AnswerBatch, *, head_chunk: int, chunk: int = 0, temperature: float = 1.0
) -> Tensor:
    """(A,) log-probabilities of the answers' tokens, without a graph; in chunks of `chunk` tokens if not 0."""
    if chunk:
        return chunked_scores(model, batch, chunk, head_chunk=head_chunk, temperature=temperature).logp
    hidden, trained = answer_hidden(model, batch), batch.trained
    scores = token_scores(
        model.head, hidden, batch.targets, temperature=temperature, head_chunk=head_chunk, trained=trained
    )
    return scores.logp


@torch.no_grad()
def token_scalars(model: RWKV, batch: AnswerBatch, name: str, chunk: int = 0) -> Tensor:
    """(A,) what the scalar head `name` says after each input of the answers, without a graph; `chunk` as above."""
    head = model.scalar_head(name)
    assert head is not None, name
    if not chunk:
        return scalars(head, answer_hidden(model, batch))
    return run_in_chunks(model, in_chunks(batch, chunk), lambda hidden, span: {name: scalars(head, hidden)})[name]


def pair_sums(model: RWKV, batch: AnswerBatch, *, head_chunk: int, chunk: int = 0) -> PairScores:
    """Summed log-probabilities of both answers of each pair; arguments as `answer_logp`."""
    logp = answer_logp(model, batch, head_chunk=head_chunk, chunk=chunk)
    return pair_scores(logp, batch.targets, batch.segments)
