"""Scores of held-out text and pairs, without training. Documents are never cut: the state carries them on.

Legend: T tokens, n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample, TextExample, pack_pairs, pack_texts
from rwkv_rlhf.data.grouping import group_by_tokens
from rwkv_rlhf.distributed.ranks import split_over_ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.losses.orpo import log_odds
from rwkv_rlhf.losses.tokens import token_scores
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.forward import pair_sums, text_hidden

ROW = 8192  # tokens run together; a longer document runs alone, carried from piece to piece
PIECE = 4096


@contextmanager
def evaluating(model: RWKV) -> Iterator[None]:
    """Without dropout inside the block; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def _long_document(model: RWKV, example: TextExample, chunk: int) -> tuple[float, int]:
    """(summed log-probability, scored tokens) of one document of any length."""
    batch = pack_texts([example]).to(next(model.parameters()).device)
    state, total, count = None, 0.0, 0
    for begin in range(0, batch.tokens.numel(), PIECE):
        hidden, state = model(batch.tokens[None, begin : begin + PIECE], state)
        targets = batch.targets[begin : begin + PIECE]
        total += float(token_scores(model.head, hidden[0], targets, chunk=chunk).logp.double().sum())
        count += int((targets >= 0).sum())
    return total, count


@torch.no_grad()
def evaluate_text(model: RWKV, examples: Iterable[TextExample], chunk: int) -> dict[str, Any]:
    """Token-weighted plain negative log-likelihood: no smoothing, no L2Wrap. Keys loss, perplexity, tokens."""
    device = next(model.parameters()).device
    rows = list(group_by_tokens(examples, lambda example: len(example.tokens), ROW))

    def scored_row(number: int) -> tuple[float, int]:
        row = rows[number]
        heartbeat(f"scoring row {number} of held-out text")
        if len(row) == 1 and len(row[0].tokens) > ROW:
            return _long_document(model, row[0], chunk)
        batch = pack_texts(row).to(device)
        scores = token_scores(model.head, text_hidden(model, batch), batch.targets, chunk=chunk)
        return float(scores.logp.double().sum()), int((batch.targets >= 0).sum())

    found = split_over_ranks(scored_row, len(rows), model)
    total, count = sum(logp for logp, _ in found), sum(scored for _, scored in found)
    if count == 0:
        raise ValueError("--val_file has no token to score: every document is shorter than two tokens")
    loss = -total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


def pair_rows(pairs: Iterable[PairExample]) -> Iterator[list[PairExample]]:
    """Neighbouring pairs that are scored together, up to ROW tokens: always the same ones for the same pairs."""
    return group_by_tokens(pairs, lambda pair: len(pair.prompt) + len(pair.chosen) + len(pair.reject), ROW)


@torch.no_grad()
def score_pairs(
    model: RWKV, pairs: Sequence[PairExample], chunk: int, progress: Any = None, length: int = 0
) -> tuple[Tensor, Tensor]:
    """(n, 2) float32 summed log-probabilities and (n, 2) token counts of (chosen, reject).

    Pairs run in file order, packed up to ROW tokens: the reference and the policy of a run see the same arithmetic.
    `progress` is called with the number of pairs done. With `length` the rows run in pieces of so many tokens. Several
    ranks share the rows out.
    """
    device = next(model.parameters()).device
    rows = list(pair_rows(pairs))

    def scored_row(number: int) -> tuple[Tensor, Tensor]:
        heartbeat(f"scoring row {number} of pairs")
        scores = pair_sums(model, pack_pairs(rows[number]).to(device), chunk, length)
        if progress is not None:
            progress(len(rows[number]))
        sums = torch.stack([scores.chosen_sum, scores.reject_sum], 1).float().cpu()
        return sums, torch.stack([scores.chosen_count, scores.reject_count], 1).cpu()

    sums, counts = zip(*split_over_ranks(scored_row, len(rows), model), strict=True)
    return torch.cat(sums), torch.cat(counts)


def pair_metrics(sums: Tensor, counts: Tensor, reference: Tensor | None, beta: float = 1.0) -> dict[str, Any]:
    """What `--eval_only` prints of pairs, from (n, 2) sums and counts of (chosen, reject).

    loss is the token-weighted negative log-likelihood of the chosen answers; margin (nats, mean over pairs) and
    accuracy are against `reference` (n, 2) if there is one; a margin of 0 counts one half. log_odds is ORPO's log odds
    ratio of the mean log-probabilities. With a reference, chosen_reward and reject_reward are the implicit rewards
    beta * (log policy - log reference), and raw_accuracy compares the answers without it.
    """
    margin = sums[:, 0] - sums[:, 1]
    if reference is not None:
        margin = margin - (reference[:, 0] - reference[:, 1])
    right = (margin > 0).float().masked_fill(margin.abs() < 1e-6, 0.5)
    means = sums / counts.clamp_min(1)
    found = likelihood(sums[:, 0], counts[:, 0]) | {
        "pairs": len(sums),
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "chosen_logp": float(sums[:, 0].mean()),
        "reject_logp": float(sums[:, 1].mean()),
        "log_odds": float((log_odds(means[:, 0]) - log_odds(means[:, 1])).mean()),
    }
    if reference is not None:
        chosen, reject = (beta * (sums - reference)).mean(0).tolist()
        raw = float((sums[:, 0] > sums[:, 1]).float().mean())
        found |= {"raw_accuracy": raw, "chosen_reward": chosen, "reject_reward": reject}
    return found


def rated_metrics(
    sums: Tensor, counts: Tensor, good: Tensor, reference: Tensor | None, beta: float = 1.0
) -> dict[str, Any]:
    """As `pair_metrics` for rated answers: columns are the answer itself and the answer to another prompt.

    loss is over the good answers. With a reference: kto_kl, KTO's estimate of KL(policy || reference) from the second
    column; accuracy, the share of answers on their side of it; margin, the mean log-ratio to the reference of good
    answers less that of bad ones, in nats.
    """
    found = likelihood(sums[good, 0], counts[good, 0]) | {"answers": len(sums)}
    if reference is None:
        return found
    ratio, other = (sums - reference).unbind(1)
    divergence = other.mean().clamp_min(0)
    margin = torch.where(good, ratio - divergence, divergence - ratio)
    right = (margin > 0).float().masked_fill(margin.abs() < 1e-6, 0.5)
    means = [float(ratio[side].mean()) if bool(side.any()) else 0.0 for side in (good, ~good)]
    return found | {
        "accuracy": float(right.mean()),
        "margin": means[0] - means[1],
        "chosen_reward": beta * means[0],
        "reject_reward": beta * means[1],
        "kto_kl": float(divergence),
    }


def likelihood(sums: Tensor, counts: Tensor) -> dict[str, Any]:
    """Token-weighted negative log-likelihood of answers, from (n,) sums and counts: loss, perplexity, tokens."""
    tokens = int(counts.sum())
    loss = -float(sums.double().sum()) / max(1, tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
