"""Statistics of log-softmax rows and the gradient of logits, one program a row; see ops/logprob.py.

n rows (tokens), V vocabulary
"""

import triton
import triton.language as tl


@triton.jit
def row_stats(logits, targets, lse, target_logit, logit_sum, max_logit, argmax, stride, V, BLOCK: tl.constexpr):
    """Of each row: log-sum-exp, the target's logit, sum, maximum and its index (the first of several)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    shares = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        inside = at + lane < V
        x = tl.load(logits + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        total += tl.where(inside, x, 0.0)
        higher = (x > best) | (x != x)  # NaN stays
        top = tl.where(higher, x, best)
        # -inf - -inf is NaN: weights of nothing are zero
        shares = shares * tl.where(best == top, 1.0, tl.exp(best - top)) + tl.where(x == top, 1.0, tl.exp(x - top))
        place = tl.where(higher, at + lane, place)
        best = top
    top = tl.max(best, axis=0)
    bad = tl.sum((shares != shares).to(tl.int32), axis=0) > 0
    weight = tl.sum(tl.where(best == float("-inf"), 0.0, shares * tl.exp(best - top)), axis=0)
    tl.store(lse + row, tl.where(bad, float("nan"), top + tl.log(weight)))
    tl.store(max_logit + row, tl.where(bad, float("nan"), top))
    tl.store(argmax + row, tl.min(tl.where(best == top, place, V - 1), axis=0).to(tl.int64))
    tl.store(logit_sum + row, tl.sum(total, axis=0))
    tl.store(target_logit + row, tl.load(logits + tl.load(targets + row)).to(tl.float32))


@triton.jit
def row_grad(logits, targets, lse, g_logp, g_mean, argmax, g_max, stride, V, BLOCK: tl.constexpr):
    """Overwrite a block of a row by g_logp (onehot(target) - p) + g_mean (1/V - p) + g_max onehot(argmax)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    inside = column < V
    p = tl.exp(tl.load(place, mask=inside, other=0.0).to(tl.float32) - tl.load(lse + row))
    logp = tl.load(g_logp + row)
    mean = tl.load(g_mean + row)
    d = mean / V - (logp + mean) * p
    d += tl.where(column == tl.load(targets + row), logp, 0.0)
    d += tl.where(column == tl.load(argmax + row), tl.load(g_max + row), 0.0)
    tl.store(place, d.to(logits.dtype.element_ty), mask=inside)
