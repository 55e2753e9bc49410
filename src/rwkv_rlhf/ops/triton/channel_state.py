"""WKV-4 token by token: one program runs BLOCK channels of one row (packed segment), forwards or back.

The formulas are those of ops/wkv4.py. Sums p and q are kept as aa, bb beside the logarithm pp of their scale, gradients
of them likewise as P, Q beside their own. While no larger weight comes the scale falls with the decay; it is then a
multiple of the decay away from where it began, so that roundings do not add up. Everything is float32.

k, v, y: (tokens, C); w, u: (C,); states: (rows, C, 3). kept: the state before each GROUP tokens.
"""

import triton
import triton.language as tl


@triton.jit
def weigh(origin, steps, decay, k):
    """Factors of the sums so far, whose scale has fallen by `steps` decays from `origin`, and of a term of weight e^k.

    Returns both factors, the new scale, and where that began and how many decays ago.
    """
    fallen = origin + decay * steps
    larger = k > fallen
    old = tl.where(larger, tl.exp(fallen - k), 1.0)
    new = tl.where(larger, 1.0, tl.exp(k - fallen))
    scale = tl.where(larger, k, fallen)
    return old, new, scale, tl.where(larger, k, origin), tl.where(larger, 0.0, steps)


@triton.jit
def forward(
    k,
    v,
    w,
    u,
    state,
    starts,
    y,
    last,
    kept,
    C,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """y, the final state, and with KEEP the state before each GROUP tokens. Grid: (rows, ceil(C / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = channel < C
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    decay = -tl.exp(tl.load(w + channel, mask=real, other=0.0))
    bonus = tl.load(u + channel, mask=real, other=0.0)
    at = state + (row * C + channel) * 3
    aa = tl.load(at, mask=real, other=0.0)
    bb = tl.load(at + 1, mask=real, other=1.0)
    pp = tl.load(at + 2, mask=real, other=0.0)
    slot = begin // GROUP + row
    origin = pp
    steps = tl.zeros([BLOCK], tl.float32)
    for t in range(begin, end):
        if KEEP:  # noqa: SIM102 - decided when compiled
            if (t - begin) % GROUP == 0:
                here = kept + ((slot + (t - begin) // GROUP) * C + channel) * 3
                tl.store(here, aa, mask=real)
                tl.store(here + 1, bb, mask=real)
                tl.store(here + 2, pp, mask=real)
        k_t = tl.load(k + t * C + channel, mask=real, other=0.0).to(tl.float32)
        v_t = tl.load(v + t * C + channel, mask=real, other=0.0).to(tl.float32)
        top = tl.maximum(pp, bonus + k_t)
        old = tl.exp(pp - top)
        new = tl.exp(bonus + k_t - top)
        y_t = (aa * old + new * v_t) / (bb * old + new)
        tl.store(y + t * C + channel, y_t.to(y.dtype.element_ty), mask=real)
        old, new, pp, origin, steps = weigh(origin, steps + 1.0, decay, k_t)
        aa = aa * old + new * v_t
        bb = bb * old + new
    at = last + (row * C + channel) * 3
    tl.store(at, aa, mask=real)
    tl.store(at + 1, bb, mask=real)
    tl.store(at + 2, pp, mask=real)


@triton.jit
def backward(
    k,
    v,
    w,
    u,
    kept,
    starts,
    dy,
    state,
    last,
    dlast,
    dk,
    dv,
    dw,
    du,
    dstate,
    states,
    C,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients, from the last token to the first. dw, du: (rows, C), to be summed. Grid as forward.

    state, last: the first and the final state. states: memory of each program, (programs, GROUP, 3, BLOCK).
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    channel = block * BLOCK + lane
    real = channel < C
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    raw = tl.load(w + channel, mask=real, other=0.0)
    decay = -tl.exp(raw)
    bonus = tl.load(u + channel, mask=real, other=0.0)
    states += (row * tl.num_programs(1) + block) * GROUP * 3 * BLOCK + lane
    at = (row * C + channel) * 3
    # the gradients of p and q are P e^scale and -Q e^scale
    P = tl.load(dlast + at, mask=real, other=0.0)
    Q = -tl.load(dlast + at + 1, mask=real, other=0.0)
    scale = -tl.load(last + at + 2, mask=real, other=0.0)
    start = scale
    since = tl.zeros([BLOCK], tl.float32)
    d_decay = tl.zeros([BLOCK], tl.float32)
    d_bonus = tl.zeros([BLOCK], tl.float32)
    slot = begin // GROUP + row
    groups = (end - begin + GROUP - 1) // GROUP
    for step in range(0, groups):
        group = groups - 1 - step
        first = begin + group * GROUP
        count = tl.minimum(end - first, GROUP)
        here = kept + ((slot + group) * C + channel) * 3
        aa = tl.load(here, mask=real, other=0.0)
        bb = tl.load(here + 1, mask=real, other=1.0)
        pp = tl.load(here + 2, mask=real, other=0.0)
        origin = pp
        steps = tl.zeros([BLOCK], tl.float32)
        for i in range(0, count):  # forwards: the state before each token
            tl.store(states + (i * 3 + 0) * BLOCK, aa)
            tl.store(states + (i * 3 + 1) * BLOCK, bb)
            tl.store(states + (i * 3 + 2) * BLOCK, pp)
            k_t = tl.load(k + (first + i) * C + channel, mask=real, other=0.0).to(tl.float32)
            v_t = tl.load(v + (first + i) * C + channel, mask=real, other=0.0).to(tl.float32)
            old, new, pp, origin, steps = weigh(origin, steps + 1.0, decay, k_t)
            aa = aa * old + new * v_t
            bb = bb * old + new
        tl.debug_barrier()  # what other threads of the program have stored is read now
        for back in range(0, count):
            i = count - 1 - back
            aa = tl.load(states + (i * 3 + 0) * BLOCK)
            bb = tl.load(states + (i * 3 + 1) * BLOCK)
            pp = tl.load(states + (i * 3 + 2) * BLOCK)
            place = (first + i) * C + channel
            k_t = tl.load(k + place, mask=real, other=0.0).to(tl.float32)
            v_t = tl.load(v + place, mask=real, other=0.0).to(tl.float32)
            dy_t = tl.load(dy + place, mask=real, other=0.0).to(tl.float32)
            top = tl.maximum(pp, bonus + k_t)
            old = tl.exp(pp - top)
            new = tl.exp(bonus + k_t - top)
            below = bb * old + new  # the denominator, times e^-top
            y_t = (aa * old + new * v_t) / below
            g = dy_t / below
            near = new * g * (v_t - y_t)
            far = tl.exp(scale + k_t)
            tl.store(dv + place, (new * g + far * P).to(dv.dtype.element_ty), mask=real)
            tl.store(dk + place, (near + far * (v_t * P - Q)).to(dk.dtype.element_ty), mask=real)
            d_bonus += near
            d_decay += tl.exp(scale + decay + pp) * (P * aa - Q * bb)
            old, new, scale, start, since = weigh(start, since + 1.0, decay, -top)
            P = P * old + new * g
            Q = Q * old + new * g * y_t
        tl.debug_barrier()  # all have read before the next group overwrites
    # in the scale of the first state; pp alone is a scale that both sums share
    aa = tl.load(state + at, mask=real, other=0.0)
    bb = tl.load(state + at + 1, mask=real, other=1.0)
    pp = tl.load(state + at + 2, mask=real, other=0.0)
    back_to = tl.exp(scale + pp)
    tl.store(dstate + at, P * back_to, mask=real)
    tl.store(dstate + at + 1, -Q * back_to, mask=real)
    whole = (P * aa - Q * bb) * back_to
    if end == begin:  # nothing was written: the last state is the first one, scale and all
        whole = tl.load(dlast + at + 2, mask=real, other=0.0)
    tl.store(dstate + at + 2, whole, mask=real)
    tl.store(dw + row * C + channel, d_decay * decay, mask=real)
    tl.store(du + row * C + channel, d_bonus, mask=real)
