"""Scores of held-out text, pairs and rated answers, without training.

Documents are never cut short: the state carries them from chunk to chunk.

Legend: T tokens, n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample, TextBatch, TextExample, pack_pairs, pack_texts
from rwkv_rlhf.data.grouping import group_by_tokens
from rwkv_rlhf.distributed.ranks import split_over_ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.losses.kinds import Loss
from rwkv_rlhf.losses.kto import rated_metrics
from rwkv_rlhf.losses.orpo import log_odds
from rwkv_rlhf.losses.pairs import PairScores, log_ratios, pair_metrics
from rwkv_rlhf.losses.tokens import token_scores
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.forward import pair_sums, text_hidden
from rwkv_rlhf.settings.config import Config

ROW = 8192  # tokens of a packed row; a longer document runs alone, carried from chunk to chunk
CHUNK = 4096

Figures = dict[str, float | int]  # by the names of `settings/metrics.py`


@contextmanager
def evaluating(model: RWKV) -> Iterator[None]:
    """Without dropout inside the block; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TextScore(NamedTuple):
    """Of some text: its summed log-probability, and how many tokens were scored."""

    logp: float
    tokens: int


def _text_score(model: RWKV, hidden: Tensor, batch: TextBatch, head_chunk: int) -> TextScore:
    """Of hidden states (T, C) and the targets that belong to them."""
    scores = token_scores(model.head, hidden, batch.targets, head_chunk=head_chunk, trained=batch.trained)
    return TextScore(float(scores.logp.double().sum()), batch.trained.count)


def _sum(scores: Iterable[TextScore]) -> TextScore:
    found = list(scores)
    return TextScore(sum(score.logp for score in found), sum(score.tokens for score in found))


@torch.no_grad()
def _long_document(model: RWKV, example: TextExample, head_chunk: int) -> TextScore:
    """One document of any length."""
    batch = pack_texts([example]).to(next(model.parameters()).device)
    state, found = None, []
    for begin in range(0, batch.tokens.numel(), CHUNK):
        part = batch.chunk(slice(begin, min(begin + CHUNK, batch.tokens.numel())))
        hidden, state = model(part.tokens[None], state)
        found.append(_text_score(model, hidden[0], part, head_chunk))
    return _sum(found)


@torch.no_grad()
def evaluate_text(model: RWKV, examples: Iterable[TextExample], head_chunk: int) -> Figures:
    """Token-weighted plain negative log-likelihood: no smoothing, no L2Wrap. Keys loss, perplexity, tokens."""
    device = next(model.parameters()).device
    rows = list(group_by_tokens(examples, lambda example: len(example.tokens), ROW))

    def scored_row(number: int) -> TextScore:
        row = rows[number]
        heartbeat(f"scoring row {number} of held-out text")
        if len(row) == 1 and len(row[0].tokens) > ROW:
            return _long_document(model, row[0], head_chunk)
        batch = pack_texts(row).to(device)
        return _text_score(model, text_hidden(model, batch), batch, head_chunk)

    whole = _sum(split_over_ranks(scored_row, len(rows), model))
    if whole.tokens == 0:
        raise ValueError("--val_file has no token to score: every document is shorter than two tokens")
    return _likelihood(whole)


def _likelihood(score: TextScore) -> Figures:
    loss = -score.logp / max(1, score.tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": score.tokens}


def pair_rows(pairs: Iterable[PairExample]) -> Iterator[list[PairExample]]:
    """Neighbouring pairs that are scored together, up to ROW tokens: always the same ones for the same pairs."""
    return group_by_tokens(pairs, lambda pair: len(pair.prompt) + len(pair.chosen) + len(pair.reject), ROW)


@torch.no_grad()
def score_pairs(
    model: RWKV,
    pairs: Sequence[PairExample],
    *,
    head_chunk: int,
    chunk: int = 0,
    progress: Callable[[int], object] | None = None,
) -> PairScores:
    """Summed log-probabilities (n,) float32 and token counts (n,) of both answers of each pair, on the host.

    Pairs run in file order, packed up to ROW tokens: the reference and the policy of a run see the same arithmetic.
    `progress` is called with the number of pairs done. With `chunk` the rows run in chunks of so many tokens. Several
    ranks share the rows out.
    """
    device = next(model.parameters()).device
    rows = list(pair_rows(pairs))

    def scored_row(number: int) -> list[Tensor]:
        heartbeat(f"scoring row {number} of pairs")
        scores = pair_sums(model, pack_pairs(rows[number]).to(device), head_chunk=head_chunk, chunk=chunk)
        if progress is not None:
            progress(len(rows[number]))
        parts = scores.chosen_sum.float(), scores.reject_sum.float(), scores.chosen_count, scores.reject_count
        whole = torch.stack([part.double() for part in parts]).cpu()  # one transfer a row
        return [there.to(part.dtype) for there, part in zip(whole, parts)]

    parts = zip(*split_over_ranks(scored_row, len(rows), model), strict=True)
    return PairScores(*map(torch.cat, parts))


def _means(sums: dict[str, Tensor], count: int) -> Figures:
    return {name: float(amount) / count for name, amount in sums.items()}


def pair_figures(scores: PairScores, reference: Tensor | None, loss: Loss[Any], config: Config) -> Figures:
    """What `--eval_only` and validation say of pairs: what training logs of them, and more.

    loss is the token-weighted negative log-likelihood of the chosen answers. Rewards are those that `loss` defines, if
    it does and has the `reference` (n, 2) that it needs. Without a reference logp_margin is the raw difference.
    """
    known = reference is not None or not loss.facts.reference
    rewards = loss.rewards(scores, reference, config) if known else None
    found = _likelihood(TextScore(float(scores.chosen_sum.double().sum()), int(scores.chosen_count.sum())))
    found["pairs"] = count = len(scores.chosen_sum)
    found |= _means(pair_metrics(scores, rewards, reference), count)
    if reference is None:
        found["logp_margin"] = found["chosen_logp"] - found["reject_logp"]
    found["log_odds_margin"] = float((log_odds(scores.chosen_mean) - log_odds(scores.reject_mean)).mean())
    return found


def decisive_margins(scores: PairScores, reference: Tensor | None, loss: Loss[Any], config: Config) -> Tensor:
    """(n,) the margins that `accuracy` counts: of the loss's rewards, or of log-probabilities where it has none."""
    known = reference is not None or not loss.facts.reference
    rewards = loss.rewards(scores, reference, config) if known else None
    if rewards is not None:
        return rewards.margin()
    return scores.chosen_sum - scores.reject_sum if reference is None else log_ratios(scores, reference).margin()


def rated_figures(scores: PairScores, good: Tensor, reference: Tensor | None, config: Config) -> Figures:
    """As `pair_figures` of rated answers, `good` (n,) bool, whose columns are the answer and one to another prompt.

    loss is over the good answers, and left out where there are none. Against a reference (n, 2) also what KTO logs, z
    estimated from the second column.
    """
    of_good = TextScore(float(scores.chosen_sum[good].double().sum()), int(scores.chosen_count[good].sum()))
    found = {**(_likelihood(of_good) if of_good.tokens else {}), "answers": len(good)}
    if reference is None:
        return found
    divergence = (scores.reject_sum - reference[:, 1]).mean().clamp_min(0)
    totals = {"total": float(len(good)), "good": float(good.sum())}
    sums = rated_metrics(scores.chosen_sum, reference[:, 0], good, divergence, config.kto_beta, **totals)
    return found | _means(sums, len(good))
