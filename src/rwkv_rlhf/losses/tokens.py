"""Scores of single tokens from hidden states, through the head, without ever holding (T, V) logits.

`token_scores` keeps one number a token and recomputes each chunk of logits in the backward pass; `weighted_nll` knows
the loss beforehand and forms the gradients already in the forward pass, one matrix product cheaper. Both are one
autograd function over the whole chunk loop whose inputs are the hidden states and the head's trainable parameters, so
that each parameter receives its summed gradient once (DDP and ZeRO reject a gradient per chunk).

Legend: T tokens, M trained tokens, C width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_rlhf.data.batch import Trained
from rwkv_rlhf.layers.scalar_head import scalars
from rwkv_rlhf.losses.entropy import token_entropy
from rwkv_rlhf.losses.head import Product, is_product, open_head
from rwkv_rlhf.ops.logprob import check_range, row_grad_, row_stats
from rwkv_rlhf.ops.random_state import RandomState, replay
from rwkv_rlhf.precision import wide_dtype

HEAD_CHUNK = 1024  # rows of logits that exist at a time
L2WRAP = 0.5e-4
SQUARE_ROWS = 64  # rows of logits that are widened to float32 at a time: 16 MiB of a World vocabulary


class RequiredStats(NamedTuple):
    """What a loss must know of each position besides log p(target); the fields of `TokenScores` in their order."""

    mean: bool = False
    max: bool = False
    square: bool = False  # costs one more product with the head
    entropy: bool = False  # as that, and two for its gradient


class TokenScores(NamedTuple):
    """Scores of each position, (T,) float32 (float64 of a float64 model), 0 where the target is IGNORE.

    None stands for what was not asked for.
    """

    logp: Tensor  # log p(target)
    mean_logp: Tensor | None = None  # the mean over the vocabulary of log p
    max_logit: Tensor | None = None  # the largest logit
    log_square: Tensor | None = None  # log sum_v p(v)^2, what a sampled token has on average; without gradient
    entropy: Tensor | None = None  # -sum_v p(v) log p(v), nats
    gathered: Tensor | None = None  # (T,K) log p of the tokens that were asked about
    scalar: Tensor | None = None  # what a scalar head says after each input, at ignored positions too

    def present(self) -> dict[str, Tensor]:
        """What was asked for, by field."""
        return {name: value for name, value in self._asdict().items() if value is not None}


LOGP_ONLY = RequiredStats()


def at_temperature(hidden: Tensor, temperature: float) -> Tensor:
    """Hidden states whose logits, the head being linear, are those of `hidden` divided by `temperature`."""
    return hidden if temperature == 1 else hidden / temperature


def token_scores(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    stats: RequiredStats = LOGP_ONLY,
    *,
    gather: Tensor | None = None,
    scalar: nn.Module | None = None,
    temperature: float = 1.0,
    head_chunk: int = HEAD_CHUNK,
    trained: Trained | None = None,
) -> TokenScores:
    """Log-probabilities of `targets` (T,) int64 under softmax(head(hidden)), hidden (T,C), and `stats`; differentiable.

    Only positions whose target is not IGNORE reach the head; token id 0 is a token like any other. The log-softmax is
    taken in float32 of logits in hidden's dtype. Gradients reach `hidden` and the head's trainable parameters; the
    gradient of `max_logit` goes to the largest logit.
    `gather` (T,K) int64: tokens whose log p is wanted at each position too, in the same run over the head; rows at
    ignored positions are not looked at. Beside the logits of one chunk they cost K numbers a trained position.
    `scalar`: a scalar head to ask too. `temperature`: what logits are divided by, by way of the hidden states.
    `trained`: the positions whose target is not IGNORE, where that is known: else a GPU is waited for.
    Raises ValueError for a chunk below 1 and, on a CPU, for a token outside the vocabulary. A GPU is not asked: the
    readers of data look at every token.
    """
    assert gather is None or (gather.dim() == 2 and gather.shape[:1] == targets.shape), (gather, targets.shape)
    rows, asked, wanted = _rows(at_temperature(hidden, temperature), targets, head_chunk, trained)
    if gather is not None and rows is not None:
        gather = gather[rows]
    params = [p for p in head.parameters() if p.requires_grad]
    with torch.autocast(hidden.device.type, enabled=False):  # the backward pass recomputes outside of any autocast
        logp, mean, top, gathered = _Scores.apply(head, head_chunk, wanted, gather, asked, *params)
        square = _log_squares(head, asked, head_chunk) if stats.square else None
        entropy = token_entropy(head, asked, head_chunk) if stats.entropy else None

    def spread(value: Tensor | None) -> Tensor | None:
        return None if value is None else _spread(value, rows, targets)

    return TokenScores(
        _spread(logp, rows, targets),
        mean_logp=spread(mean if stats.mean else None),
        max_logit=spread(top if stats.max else None),
        log_square=spread(square),
        entropy=spread(entropy),
        gathered=spread(gathered),
        scalar=None if scalar is None else scalars(scalar, hidden),
    )


class WeightedNll(NamedTuple):
    """What `weighted_nll` finds, () each: the sum, and its parts without a gradient."""

    value: Tensor
    loss: Tensor  # the sum without the penalty
    nll: Tensor  # sum of weights * -log p
    l2wrap: Tensor  # the penalty


def weighted_nll(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    head_chunk: int = HEAD_CHUNK,
    smoothing: float = 0.0,
    l2wrap_weight: float = 0.0,
    trained: Trained | None = None,
) -> WeightedNll:
    """sum_t weights_t * (-(1-smoothing) log p_t - smoothing * mean_k log p_k + l2wrap_weight * max_logit_t^2).

    The same value and gradients as `token_scores` and that sum, for 3 instead of 4 matrix products: the gradients are
    formed during the forward pass and scaled by the upstream gradient in the backward pass, which can run only once.
    `weights` (T,) are constants, 1 if None. The other arguments and what is raised: as `token_scores`.
    """
    rows, asked, wanted = _rows(hidden, targets, head_chunk, trained)
    if weights is None:
        weights = torch.ones_like(wanted, dtype=torch.float32)
    elif rows is not None:
        weights = weights[rows]
    params = [p for p in head.parameters() if p.requires_grad]
    learn = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        found = _WeightedNll.apply(
            head, head_chunk, smoothing, l2wrap_weight, learn, weights.detach(), wanted, asked, *params
        )
    return WeightedNll(*found)


class _Scores(torch.autograd.Function):
    """(hidden (M,C), parameters) -> log p(target), mean log p, max logit, each (M,), and log p of `gather` (M,K)."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        head_chunk: int,
        targets: Tensor,
        gather: Tensor | None,
        hidden: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor | None, ...]:
        drawn = head.training and not is_product(head)  # an adapter may have a dropout
        ctx.random = RandomState.now(hidden.device) if drawn else None
        ctx.head, ctx.head_chunk = head, head_chunk
        ctx.set_materialize_grads(False)
        wide = wide_dtype(hidden.dtype)
        lse, logp, mean_logp, top = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(4))
        argmax = torch.empty_like(targets)
        gathered = None if gather is None else hidden.new_empty(gather.shape, dtype=wide)
        run = open_head(head, hidden, head_chunk)
        for chunk in run.chunks:
            logits = run.logits(chunk)
            if chunk.start == 0:
                _check_range(targets, logits.shape[1])
                if gather is not None:
                    _check_range(gather, logits.shape[1], "the teacher's token id")
            stats = row_stats(logits, targets[chunk], checked=True)
            lse[chunk], top[chunk], argmax[chunk] = stats.lse, stats.max_logit, stats.argmax
            logp[chunk] = stats.target_logit - stats.lse
            mean_logp[chunk] = stats.logit_sum / logits.shape[1] - stats.lse
            if gather is not None and gathered is not None:
                gathered[chunk] = logits.gather(1, gather[chunk]).to(wide) - stats.lse[:, None]
        # a single chunk's logits fit in the memory that backward would need for them anyway: a product saved
        keep = len(run.chunks) == 1 and isinstance(run, Product) and any(ctx.needs_input_grad)
        ctx.logits = logits if keep else None
        ctx.save_for_backward(targets, gather, hidden, lse, argmax, *params)
        return logp, mean_logp, top, gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        targets, gather, hidden, lse, argmax, *params = ctx.saved_tensors
        need_hidden, needed = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        *of_scores, g_gathered = upstream
        slopes = [torch.zeros_like(lse) if g is None else g for g in of_scores]
        with replay(ctx.random):
            run = open_head(ctx.head, hidden, ctx.head_chunk, [p for p, n in zip(params, needed) if n], need_hidden)
            for chunk in run.chunks:
                kept, ctx.logits = ctx.logits, None  # overwritten below: a second backward computes them again
                logits = run.logits(chunk) if kept is None else kept
                g_logp, g_mean, g_max = (g[chunk] for g in slopes)
                rows = (targets[chunk], lse[chunk], g_logp, g_mean, argmax[chunk], g_max)
                if g_gathered is None:
                    row_grad_(logits, *rows)
                else:
                    _gathered_grad_(logits, *rows, gather[chunk], g_gathered[chunk])
                run.push(chunk, logits)
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
    gather: Tensor,
    g_gathered: Tensor,
) -> None:
    """As `row_grad_`, plus g_k * (onehot(token_k) - p) for each of a row's K tokens `gather` (n,K), g `g_gathered`.

    All terms -p come with one coefficient, so that of the K tokens goes through the target's place in `row_grad_`, and
    the target's own entry is then written anew: added and taken off again, it would be lost in bfloat16.
    """
    total = g_gathered.sum(1)
    p_target = (logits.gather(1, targets[:, None])[:, 0].to(lse.dtype) - lse).exp()
    row_grad_(logits, targets, lse, g_logp + total, g_mean, argmax, g_max)
    entry = g_logp - (g_logp + g_mean + total) * p_target + g_mean / logits.shape[1] + g_max * (argmax == targets)
    # not scatter_ and scatter_add_, which widen all of bfloat16 logits on a CPU; the latter has no fixed order on a GPU
    rows = torch.arange(len(gather), device=gather.device)
    logits[rows, targets] = entry.to(logits.dtype)
    logits.index_put_((rows[:, None].expand_as(gather), gather), g_gathered.to(logits.dtype), accumulate=True)


class _WeightedNll(torch.autograd.Function):
    """As `weighted_nll`, of trained rows only. The gradients for an upstream gradient of 1 wait in ctx.found."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        head_chunk: int,
        smoothing: float,
        l2wrap_weight: float,
        learn: bool,
        weights: Tensor,
        targets: Tensor,
        hidden: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        need_hidden, needed = learn and ctx.needs_input_grad[7], [learn and n for n in ctx.needs_input_grad[8:]]
        run = open_head(head, hidden, head_chunk, [p for p, n in zip(params, needed) if n], need_hidden)
        weights = weights.to(wide_dtype(hidden.dtype))
        nll, smooth, wrap = (weights.new_empty(len(hidden)) for _ in range(3))
        for chunk in run.chunks:
            logits, w = run.logits(chunk), weights[chunk]
            if chunk.start == 0:
                _check_range(targets, logits.shape[1])
            stats = row_stats(logits, targets[chunk], checked=True)
            nll[chunk] = (stats.lse - stats.target_logit) * w
            smooth[chunk] = (stats.lse - stats.logit_sum / logits.shape[1]) * w
            wrap[chunk] = l2wrap_weight * stats.max_logit.square() * w
            if need_hidden or any(needed):
                g_max = 2 * l2wrap_weight * stats.max_logit * w
                row_grad_(logits, targets[chunk], stats.lse, (smoothing - 1) * w, -smoothing * w, stats.argmax, g_max)
                run.push(chunk, logits)
        d_hidden, d_params = run.gradients()
        given = iter(d_params)
        ctx.found = [d_hidden, *(next(given) if n else None for n in needed)]
        loss = (1 - smoothing) * nll.sum() + smoothing * smooth.sum()
        penalty = wrap.sum()
        parts = (loss, nll.sum(), penalty)
        ctx.mark_non_differentiable(*parts)
        return (loss + penalty, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Handed out, not kept: a tensor that nobody else holds becomes the parameter's .grad without a copy.
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("weighted_nll was differentiated twice; its gradients exist only once")
        for gradient in found:
            if gradient is not None:
                gradient.mul_(upstream)
        return (None, None, None, None, None, None, None, *found)


def _check_range(tokens: Tensor, vocabulary: int, what: str = "token id") -> None:
    if tokens.is_cpu:
        check_range(tokens, vocabulary, what)


class _Rows(NamedTuple):
    """The trained positions: their indices (M,), None if that is all of them, and hidden and targets there."""

    rows: Tensor | None
    hidden: Tensor
    targets: Tensor


def _rows(hidden: Tensor, targets: Tensor, head_chunk: int, trained: Trained | None) -> _Rows:
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    if head_chunk < 1:
        raise ValueError(f"the head's chunk is {head_chunk} rows; it must be at least 1")
    rows = (Trained.of(targets) if trained is None else trained).on(targets.device)
    return _Rows(None, hidden, targets) if rows is None else _Rows(rows, hidden[rows], targets[rows])


def _spread(value: Tensor, rows: Tensor | None, targets: Tensor) -> Tensor:
    """Values of the trained positions (M,...) -> (T,...), 0 elsewhere."""
    if rows is None:
        return value
    return value.new_zeros(len(targets), *value.shape[1:]).index_copy(0, rows, value)


@torch.no_grad()
def _log_squares(head: nn.Module, hidden: Tensor, head_chunk: int) -> Tensor:
    """log sum_v p(v)^2 under softmax(head(hidden)), hidden (M,C) -> (M,), by one more product with the head."""
    found = torch.empty(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    run = open_head(head, hidden.detach(), head_chunk)
    for chunk in run.chunks:
        blocks = (block.to(found.dtype) for block in run.logits(chunk).split(SQUARE_ROWS))
        rows = [torch.logsumexp(2 * block, 1) - 2 * torch.logsumexp(block, 1) for block in blocks]
        found[chunk] = torch.cat(rows)
    return found
