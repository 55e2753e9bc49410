"""Element-wise groups on the device: what ops/elementwise_naive.py defines, in one pass over memory each.

Every program has a tile of ROWS tokens and BLOCK channels (or one head). Only inputs are read again for gradients. A
per-channel gradient is a sum over tokens: each program writes the sum of its tile, (row blocks, C), and the host adds
those up, in an order that depends on the shapes alone. Arithmetic is float32, results are rounded once.

C channels, N head size, M mixes
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def put(x, place, value, mask):
    """Store float32 numbers in the type of x."""
    tl.store(x + place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def get(x, place, mask):
    """Load as float32."""
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def vector(x, channel, real):
    """Numbers that all tokens share, (1, channels)."""
    return tl.load(x + channel, mask=real, other=0.0)[None, :]


@triton.jit
def tile_of_channels(rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tokens (ROWS,) and channels (BLOCK,); their places in memory and which exist, (ROWS, BLOCK)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row, channel, row[:, None] * C + channel[None, :], (row < rows)[:, None] & (channel < C)[None, :]


@triton.jit
def tile_of_head(rows, C, ROWS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr):
    """The channels of this program's head (LANES,), which of them exist, and places and existence, (ROWS, LANES)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * N + tl.arange(0, LANES)
    real = tl.arange(0, LANES) < N
    return channel, real, row[:, None] * C + channel[None, :], (row < rows)[:, None] & real[None, :]


# ---------------------------------------------------------------- token mix


@triton.jit
def before(x, last, marks, row, channel, mask, C, HAS_LAST: tl.constexpr):
    """The token before each of `row`: its neighbour, or at a segment's beginning that segment's `last`, or zero."""
    segment = tl.load(marks + row, mask=mask, other=0)[:, None]  # 0, or 1 + the segment that begins here
    inside = mask[:, None] & (channel < C)[None, :]
    place = (row[:, None] - 1) * C + channel[None, :]
    previous = get(x, place, inside & (segment == 0))
    if HAS_LAST:
        previous += get(last, (segment - 1).to(tl.int64) * C + channel[None, :], inside & (segment > 0))
    return previous


@triton.jit
def token_mix(
    x,
    last,
    marks,
    mixes,
    out,
    rows,
    C,
    M: tl.constexpr,
    HAS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m] = x + (previous - x) mixes[m]; out: a tuple of M pointers. Grid: (row blocks, channel blocks)."""
    row, channel, place, inside = tile_of_channels(rows, C, ROWS, BLOCK)
    now = get(x, place, inside)
    change = before(x, last, marks, row, channel, row < rows, C, HAS_LAST) - now
    for m in tl.static_range(M):
        mix = vector(mixes + m * C, channel, channel < C)
        put(out[m], place, now + change * mix, inside)


@triton.jit
def token_mix_backward(
    x,
    last,
    marks,
    mixes,
    grads,
    dx,
    dlast,
    dmixes,
    rows,
    C,
    M: tl.constexpr,
    HAS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx, dlast and the parts of dmixes (row blocks, M, C), from grads: a tuple of M pointers. Grid as above."""
    row, channel, place, inside = tile_of_channels(rows, C, ROWS, BLOCK)
    real = channel < C
    change = before(x, last, marks, row, channel, row < rows, C, HAS_LAST) - get(x, place, inside)
    segment = tl.load(marks + row, mask=row < rows, other=0)[:, None]
    later = tl.load(marks + row + 1, mask=row + 1 < rows, other=1)[:, None]  # the last token is before none
    own = tl.zeros([ROWS, BLOCK], tl.float32)
    passed = tl.zeros([ROWS, BLOCK], tl.float32)
    following = tl.zeros([ROWS, BLOCK], tl.float32)
    for m in tl.static_range(M):
        mix = vector(mixes + m * C, channel, real)
        d = get(grads[m], place, inside)
        own += d * (1.0 - mix)
        passed += d * mix
        following += get(grads[m], place + C, inside & (later == 0)) * mix
        part = dmixes + (tl.program_id(0).to(tl.int64) * M + m) * C + channel
        tl.store(part, tl.sum(d * change, axis=0), mask=real)
    put(dx, place, own + following, inside)
    if HAS_LAST:
        put(dlast, (segment - 1).to(tl.int64) * C + channel[None, :], passed, inside & (segment > 0))


# ---------------------------------------------------------------- residual sum and LayerNorm


@triton.jit
def unit(x, real, C, EPS: tl.constexpr):
    """The numbers of a token with mean 0 and variance 1, and what they were divided by, inverted."""
    off = tl.where(real, x - tl.sum(x, axis=0) / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, axis=0) / C + EPS)
    return off * scale, scale


@triton.jit
def residual_norm(
    x, y, weight, bias, total, normed, rows, C, EPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """total = x + y, rounded, and normed = LayerNorm(total), one token after the other. Grid: (row blocks,)."""
    channel = tl.arange(0, LANES)
    real = channel < C
    scale, shift = get(weight, channel, real), get(bias, channel, real)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = real & (channel * 0 + row < rows)
        place = row * C + channel
        now = (get(x, place, inside) + get(y, place, inside)).to(total.dtype.element_ty)
        tl.store(total + place, now, mask=inside)
        plain, _ = unit(now.to(tl.float32), real, C, EPS)
        put(normed, place, plain * scale + shift, inside)


@triton.jit
def residual_norm_backward(
    total,
    weight,
    dtotal,
    dnormed,
    dx,
    parts,
    rows,
    C,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx of both summands, and dweight, dbias in parts (row blocks, 2, C)."""
    channel = tl.arange(0, LANES)
    real = channel < C
    scale = get(weight, channel, real)
    dweight = tl.zeros([LANES], tl.float32)
    dbias = tl.zeros([LANES], tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = real & (channel * 0 + row < rows)
        place = row * C + channel
        plain, inverse = unit(get(total, place, inside), real, C, EPS)
        d = get(dnormed, place, inside)
        dweight += d * plain
        dbias += d
        d *= scale
        d -= tl.sum(d, axis=0) / C + plain * (tl.sum(d * plain, axis=0) / C)
        put(dx, place, get(dtotal, place, inside) + d * inverse, inside)
    part = tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(parts + part, dweight, mask=real)
    tl.store(parts + part + C, dbias, mask=real)


# ---------------------------------------------------------------- gates and squared ReLU


@triton.jit
def value_gate(v, first, v0, v12, out, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = v + (first - v) sigmoid(v0 + v12)."""
    _, channel, place, inside = tile_of_channels(rows, C, ROWS, BLOCK)
    now = get(v, place, inside)
    share = sigmoid(vector(v0, channel, channel < C) + get(v12, place, inside))
    put(out, place, now + (get(first, place, inside) - now) * share, inside)


@triton.jit
def value_gate_backward(
    v, first, v0, v12, grad, dv, dfirst, dv12, dv0, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """All gradients; dv0 in parts (row blocks, C)."""
    _, channel, place, inside = tile_of_channels(rows, C, ROWS, BLOCK)
    d = get(grad, place, inside)
    share = sigmoid(vector(v0, channel, channel < C) + get(v12, place, inside))
    slope = d * (get(first, place, inside) - get(v, place, inside)) * share * (1.0 - share)
    put(dv, place, d * (1.0 - share), inside)
    put(dfirst, place, d * share, inside)
    put(dv12, place, slope, inside)
    tl.store(dv0 + tl.program_id(0).to(tl.int64) * C + channel, tl.sum(slope, axis=0), mask=channel < C)


@triton.jit
def relu_squared(x, out, count, BLOCK: tl.constexpr):
    """out = max(x, 0)^2; NaN stays."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    now = get(x, place, place < count)
    now = tl.where(now < 0.0, 0.0, now)
    put(out, place, now * now, place < count)


@triton.jit
def relu_squared_backward(out, grad, dx, count, BLOCK: tl.constexpr):
    """dx = 2 sqrt(out) grad."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    put(dx, place, 2.0 * tl.sqrt(get(out, place, inside)) * get(grad, place, inside), inside)


# ---------------------------------------------------------------- by heads; grid: (row blocks, heads)
# LANES: N rounded up to a power of two.


@triton.jit
def delta_keys(
    k,
    k_k,
    k_a,
    a0,
    a12,
    out,
    removed,
    written,
    rows,
    C,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """k (1 + (a - 1) k_a), -kk and kk a with a = sigmoid(a0 + a12) and kk = k k_k of unit length."""
    channel, real, place, inside = tile_of_head(rows, C, ROWS, N, LANES)
    key = get(k, place, inside)
    rate = sigmoid(vector(a0, channel, real) + get(a12, place, inside))
    scaled = key * vector(k_k, channel, real)
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))[:, None]
    kk = scaled / tl.where(norm < EPS, EPS, norm)
    put(out, place, key * (1.0 + (rate - 1.0) * vector(k_a, channel, real)), inside)
    put(removed, place, -kk, inside)
    put(written, place, kk * rate, inside)


@triton.jit
def delta_keys_backward(
    k,
    k_k,
    k_a,
    a0,
    a12,
    d_out,
    d_removed,
    d_written,
    dk,
    da12,
    parts,
    rows,
    C,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """All gradients; those of k_k, k_a, a0 in parts (row blocks, 3, C)."""
    channel, real, place, inside = tile_of_head(rows, C, ROWS, N, LANES)
    key = get(k, place, inside)
    scale = vector(k_k, channel, real)
    amount = vector(k_a, channel, real)
    rate = sigmoid(vector(a0, channel, real) + get(a12, place, inside))
    scaled = key * scale
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))[:, None]
    short = norm < EPS
    divisor = tl.where(short, EPS, norm)
    kk = scaled / divisor
    d1 = get(d_out, place, inside)
    d3 = get(d_written, place, inside)
    d_kk = d3 * rate - get(d_removed, place, inside)
    along = tl.where(short, 0.0, tl.sum(d_kk * kk, axis=1)[:, None])  # a norm that is cut is a constant
    d_scaled = (d_kk - kk * along) / divisor
    slope = (d1 * key * amount + d3 * kk) * rate * (1.0 - rate)
    put(dk, place, d1 * (1.0 + (rate - 1.0) * amount) + d_scaled * scale, inside)
    put(da12, place, slope, inside)
    part = parts + tl.program_id(0).to(tl.int64) * 3 * C + channel
    tl.store(part, tl.sum(d_scaled * key, axis=0), mask=real)
    tl.store(part + C, tl.sum(d1 * key * (rate - 1.0), axis=0), mask=real)
    tl.store(part + 2 * C, tl.sum(slope, axis=0), mask=real)


@triton.jit
def gated_norm(
    y,
    r,
    k,
    v,
    r_k,
    weight,
    bias,
    g,
    out,
    rows,
    C,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """(norm(y) weight + bias + (sum r k r_k) v) g."""
    channel, real, place, inside = tile_of_head(rows, C, ROWS, N, LANES)
    head = get(y, place, inside)
    head = tl.where(inside, head - tl.sum(head, axis=1)[:, None] / N, 0.0)
    head *= 1.0 / tl.sqrt(tl.sum(head * head, axis=1)[:, None] / N + EPS)
    mixed = get(r, place, inside) * get(k, place, inside) * vector(r_k, channel, real)
    bonus = tl.sum(mixed, axis=1)[:, None]
    normed = head * vector(weight, channel, real) + vector(bias, channel, real)
    put(out, place, (normed + bonus * get(v, place, inside)) * get(g, place, inside), inside)


@triton.jit
def gated_norm_backward(
    y,
    r,
    k,
    v,
    r_k,
    weight,
    bias,
    g,
    grad,
    dy,
    dr,
    dk,
    dv,
    dg,
    parts,
    rows,
    C,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
):
    """All gradients; those of r_k, weight, bias in parts (row blocks, 3, C)."""
    channel, real, place, inside = tile_of_head(rows, C, ROWS, N, LANES)
    head = get(y, place, inside)
    head = tl.where(inside, head - tl.sum(head, axis=1)[:, None] / N, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(head * head, axis=1)[:, None] / N + EPS)
    head *= inverse
    read = get(r, place, inside)
    key = get(k, place, inside)
    value = get(v, place, inside)
    share = vector(r_k, channel, real)
    gain = vector(weight, channel, real)
    bonus = tl.sum(read * key * share, axis=1)[:, None]
    d = get(grad, place, inside)
    put(dg, place, d * (head * gain + vector(bias, channel, real) + bonus * value), inside)
    d *= get(g, place, inside)
    d_bonus = tl.sum(d * value, axis=1)[:, None]
    put(dv, place, d * bonus, inside)
    put(dr, place, d_bonus * key * share, inside)
    put(dk, place, d_bonus * read * share, inside)
    part = parts + tl.program_id(0).to(tl.int64) * 3 * C + channel
    tl.store(part, tl.sum(d_bonus * read * key, axis=0), mask=real)
    tl.store(part + C, tl.sum(d * head, axis=0), mask=real)
    tl.store(part + 2 * C, tl.sum(d, axis=0), mask=real)
    d *= gain
    d -= tl.sum(d, axis=1)[:, None] / N + head * (tl.sum(d * head, axis=1)[:, None] / N)
    put(dy, place, d * inverse, inside)
