"""Scores of single tokens from hidden states, through the head, without ever holding (T, V) logits.

`token_scores` keeps one number a token and recomputes each chunk of logits in the backward pass; `weighted_nll` knows
the loss beforehand and forms the gradients already in the forward pass, one matrix product cheaper. Both are one
autograd function over the whole chunk loop whose inputs are the hidden states and the head's trainable parameters, so
that each parameter receives its summed gradient once (DDP and ZeRO reject a gradient per chunk).

Legend: T tokens, M trained tokens, C width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_rlhf.losses.head import Product, open_head, random_state, replayed
from rwkv_rlhf.losses.squares import log_squares
from rwkv_rlhf.ops.logprob import check_range, row_grad_, row_stats
from rwkv_rlhf.precision import wide_dtype

IGNORE = -100
CHUNK = 1024
L2WRAP = 0.5e-4


class TokenScores(NamedTuple):
    """Of each position, float32 (float64 of a float64 model), 0 where the target is IGNORE: log p(target) and, where
    asked for, the mean over the vocabulary of log p, the largest logit, and log sum_v p(v)^2 (without gradient)."""

    logp: Tensor
    mean_logp: Tensor | None
    max_logit: Tensor | None
    log_square: Tensor | None = None


def token_scores(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    chunk: int = CHUNK,
    want_mean: bool = False,
    want_max: bool = False,
    want_square: bool = False,
) -> TokenScores:
    """Log-probabilities of `targets` (T,) int64 under softmax(head(hidden)), hidden (T,C); differentiable.

    Only positions whose target is not IGNORE reach the head; token id 0 is a token like any other. The log-softmax is
    taken in float32 of logits in hidden's dtype. Gradients reach `hidden` and the head's trainable parameters; the
    gradient of `max_logit` goes to the largest logit.
    Raises ValueError for a target outside the vocabulary or a chunk below 1.
    """
    (logp, mean_logp, max_logit), square = _scores(head, hidden, targets, None, chunk, want_square)
    return TokenScores(logp, mean_logp if want_mean else None, max_logit if want_max else None, square)


def gathered_scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, at: Tensor, *, chunk: int = CHUNK
) -> tuple[TokenScores, Tensor]:
    """All that `token_scores` gives and, of each position, log p of the K tokens `at` (T,K) int64, in one run.

    The second tensor is (T,K), 0 at ignored positions, differentiable like the scores; rows of `at` there are not
    looked at. Beside the logits of one chunk it costs K numbers a trained position. Raises as `token_scores`.
    """
    assert at.dim() == 2 and at.shape[:1] == targets.shape, (at.shape, targets.shape)
    (logp, mean_logp, max_logit, picked), _ = _scores(head, hidden, targets, at, chunk)
    return TokenScores(logp, mean_logp, max_logit), picked


def _scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, at: Tensor | None, chunk: int, want_square: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """What `_Scores` finds, spread over all positions, and log sum_v p(v)^2 if wanted."""
    rows, trained, wanted = _trained(hidden, targets, chunk)
    if at is not None and rows is not None:
        at = at[rows]
    params = [p for p in head.parameters() if p.requires_grad]
    with torch.autocast(hidden.device.type, enabled=False):  # the backward pass recomputes outside of any autocast
        found = _Scores.apply(head, chunk, wanted, at, trained, *params)
        square = log_squares(head, trained, chunk) if want_square else None
    spread = [_spread(value, rows, targets) for value in found if value is not None]
    return spread, None if square is None else _spread(square, rows, targets)


def weighted_nll(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    smoothing: float = 0.0,
    l2wrap_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_t weights_t * (-(1-smoothing) log p_t - smoothing * mean_k log p_k + l2wrap_weight * max_logit_t^2).

    The same value and gradients as `token_scores` and that sum, for 3 instead of 4 matrix products: the gradients are
    formed during the forward pass and scaled by the upstream gradient in the backward pass, which can run only once.
    `weights` (T,) are constants, 1 if None. `hidden`, `targets`, `chunk` and what is raised: as `token_scores`.
    Returns (sum, {"loss": sum without the last term, "nll": sum of weights * -log p, "l2wrap": sum of the last term}),
    the entries of the dict without a gradient.
    """
    rows, trained, wanted = _trained(hidden, targets, chunk)
    if weights is None:
        weights = torch.ones_like(wanted, dtype=torch.float32)
    elif rows is not None:
        weights = weights[rows]
    params = [p for p in head.parameters() if p.requires_grad]
    learn = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        total, loss, nll, l2wrap = _WeightedNll.apply(
            head, chunk, smoothing, l2wrap_weight, learn, weights.detach(), wanted, trained, *params
        )
    return total, {"loss": loss, "nll": nll, "l2wrap": l2wrap}


class _Scores(torch.autograd.Function):
    """(hidden (M,C), parameters) -> log p(target), mean log p, max logit, each (M,), and log p of `at` (M,K)."""

    @staticmethod
    def forward(ctx, head, chunk, targets, at, hidden, *params):
        ctx.head, ctx.chunk, ctx.random = head, chunk, random_state(head, hidden)
        ctx.set_materialize_grads(False)
        wide = _score_dtype(hidden)
        lse, logp, mean_logp, top = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(4))
        argmax = torch.empty_like(targets)
        picked = None if at is None else hidden.new_empty(at.shape, dtype=wide)
        run = open_head(head, hidden, chunk)
        for part in run.parts:
            logits = run.logits(part)
            if part.start == 0:
                check_range(targets, logits.shape[1])
                if at is not None:
                    check_range(at, logits.shape[1], "the teacher's token id")
            stats = row_stats(logits, targets[part], checked=True)
            lse[part], top[part], argmax[part] = stats.lse, stats.max_logit, stats.argmax
            logp[part] = stats.target_logit - stats.lse
            mean_logp[part] = stats.logit_sum / logits.shape[1] - stats.lse
            if at is not None:
                picked[part] = logits.gather(1, at[part]).to(wide) - stats.lse[:, None]
        # a single chunk's logits fit in the memory that backward would need for them anyway: a product saved
        ctx.logits = logits if len(run.parts) == 1 and isinstance(run, Product) and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(targets, at, hidden, lse, argmax, *params)
        return logp, mean_logp, top, picked

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        targets, at, hidden, lse, argmax, *params = ctx.saved_tensors
        need_hidden, needed = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        *upstream, g_at = upstream
        slopes = [torch.zeros_like(lse) if g is None else g for g in upstream]
        with replayed(ctx.random, hidden):
            run = open_head(ctx.head, hidden, ctx.chunk, [p for p, n in zip(params, needed) if n], need_hidden)
            for part in run.parts:
                kept, ctx.logits = ctx.logits, None  # overwritten below: a second backward computes them again
                logits = run.logits(part) if kept is None else kept
                g_logp, g_mean, g_max = (g[part] for g in slopes)
                rows = (targets[part], lse[part], g_logp, g_mean, argmax[part], g_max)
                if g_at is None:
                    row_grad_(logits, *rows)
                else:
                    _gathered_grad_(logits, *rows, at[part], g_at[part])
                run.push(part, logits)
        d_hidden, d_params = run.gradients()
        given = iter(d_params)
        return (None, None, None, None, d_hidden, *(next(given) if n else None for n in needed))


def _gathered_grad_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    g_logp: Tensor,
    g_mean: Tensor,
    argmax: Tensor,
    g_max: Tensor,
    at: Tensor,
    g_at: Tensor,
) -> None:
    """As `row_grad_`, plus g_at_k * (onehot(at_k) - p) for each of a row's K tokens `at` (n,K).

    All terms -p come with one coefficient, so that of the K tokens goes through the target's place in `row_grad_`, and
    the target's own entry is then written anew: added and taken off again, it would be lost in bfloat16.
    """
    total = g_at.sum(1)
    p_target = (logits.gather(1, targets[:, None])[:, 0].to(lse.dtype) - lse).exp()
    row_grad_(logits, targets, lse, g_logp + total, g_mean, argmax, g_max)
    entry = g_logp - (g_logp + g_mean + total) * p_target + g_mean / logits.shape[1] + g_max * (argmax == targets)
    # not scatter_ and scatter_add_, which widen all of bfloat16 logits on a CPU; the latter has no fixed order on a GPU
    rows = torch.arange(len(at), device=at.device)
    logits[rows, targets] = entry.to(logits.dtype)
    logits.index_put_((rows[:, None].expand_as(at), at), g_at.to(logits.dtype), accumulate=True)


class _WeightedNll(torch.autograd.Function):
    """As `weighted_nll`, of trained rows only. The gradients for an upstream gradient of 1 wait in ctx.found."""

    @staticmethod
    def forward(ctx, head, chunk, smoothing, l2wrap_weight, learn, weights, targets, hidden, *params):
        need_hidden, needed = learn and ctx.needs_input_grad[7], [learn and n for n in ctx.needs_input_grad[8:]]
        run = open_head(head, hidden, chunk, [p for p, n in zip(params, needed) if n], need_hidden)
        weights = weights.to(_score_dtype(hidden))
        nll, smooth, wrap = (weights.new_empty(len(hidden)) for _ in range(3))
        for part in run.parts:
            logits, w = run.logits(part), weights[part]
            if part.start == 0:
                check_range(targets, logits.shape[1])
            stats = row_stats(logits, targets[part], checked=True)
            nll[part] = (stats.lse - stats.target_logit) * w
            smooth[part] = (stats.lse - stats.logit_sum / logits.shape[1]) * w
            wrap[part] = l2wrap_weight * stats.max_logit.square() * w
            if need_hidden or any(needed):
                g_max = 2 * l2wrap_weight * stats.max_logit * w
                row_grad_(logits, targets[part], stats.lse, (smoothing - 1) * w, -smoothing * w, stats.argmax, g_max)
                run.push(part, logits)
        d_hidden, d_params = run.gradients()
        given = iter(d_params)
        ctx.found = [d_hidden, *(next(given) if n else None for n in needed)]
        loss = (1 - smoothing) * nll.sum() + smoothing * smooth.sum()
        total, parts = loss + wrap.sum(), (loss.clone(), nll.sum(), wrap.sum())
        ctx.mark_non_differentiable(*parts)
        return (total, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        # Handed out, not kept: a tensor that nobody else holds becomes the parameter's .grad without a copy.
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("weighted_nll was differentiated twice; its gradients exist only once")
        for gradient in found:
            if gradient is not None:
                gradient.mul_(upstream)
        return (None, None, None, None, None, None, None, *found)


def _trained(hidden: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Indices of the trained positions (None if that is all of them), and hidden and targets there."""
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    if chunk < 1:
        raise ValueError(f"the head's chunk is {chunk} rows; it must be at least 1")
    keep = targets != IGNORE
    if bool(keep.all()):
        return None, hidden, targets
    rows = keep.nonzero()[:, 0]
    return rows, hidden[rows], targets[rows]


def _spread(value: Tensor, rows: Tensor | None, targets: Tensor) -> Tensor:
    """Values of the trained positions (M,...) -> (T,...), 0 elsewhere."""
    if rows is None:
        return value
    return value.new_zeros(len(targets), *value.shape[1:]).index_copy(0, rows, value)


def _score_dtype(hidden: Tensor) -> torch.dtype:
    return wide_dtype(hidden.dtype)
