"""The recurrences with a matrix state, WKV-5.2, WKV-6 and WKV-7, in chunks of L tokens by matrix products.

One program runs one head of one row (packed segment), or of a piece of it, and VB of its N value channels, from the
first chunk to the last, or back. The formulas are those of ops/wkv5.py, wkv6.py and wkv7.py, summed over a chunk ("UT
transform": Yang et al., arXiv 2406.06484; with a decay: RWKV-7, arXiv 2503.14456). With g the cumulative log decay from
the beginning of the chunk, e = g without the own token's, S the state before the chunk, and pairs of tokens i, j of the
chunk:

    A_rk[i,j] = sum_n r_i k_j exp(g_i - g_j), j <= i; A_rb likewise with b; A_ak, A_ab with a_i exp(e_i - g_j), j < i
    U = (I - A_ab)^-1 (A_ak V + (a exp e) S^T)                         row i is S_{i-1} a_i
    Y = (r exp g) S^T + A_rk V + A_rb U
    S' = S diag(exp g_L) + V^T (k exp(g_L - g)) + U^T (b exp(g_L - g))

WKV-5 and 6 have no a and b, read the state before the token (exp(e_i - g_j), j < i), and add (sum_n r u k) v. The
exponents are taken from the middle c = g_L / 2 of the chunk's decay, which keeps both factors of a product finite: for
WKV-7 log decays lie above -0.61, for the others they are cut at -10, where a decay is 5e-5 of what was there.

r, w, k, v, a, b, y: (tokens, H, N); states: (rows, H, N value, N key), float32. kept: the state each GROUP tokens of a
row. A long row may run as several pieces, of a multiple of GROUP tokens each, as if they were rows: pieces.py finds
the state before each of them. `pieces`, int64 (pieces + 1, 4): the token where piece p begins, its row, the first piece
of row p, and the p-th piece that another of its row follows.
"""

import math

import triton
import triton.language as tl

from rwkv_rlhf.ops.triton.products import coarse, fine, inverse

DECAY_RATE = tl.constexpr(math.exp(-0.5))
LOWEST = tl.constexpr(-10.0)


@triton.jit
def log_decay(x, VERSION: tl.constexpr):
    """Logarithm of the decay that the raw input x means."""
    if VERSION == 7:
        log = -DECAY_RATE / (1.0 + tl.exp(-x))
    else:
        log = -tl.exp(x)
        log = tl.where(log < LOWEST, LOWEST, log)  # a comparison: NaN stays
    return log


@triton.jit
def log_decay_slope(x, VERSION: tl.constexpr):
    """Derivative of `log_decay`: 0 where it is cut."""
    log = log_decay(x, VERSION)
    if VERSION == 7:
        slope = log * (1.0 + log / DECAY_RATE)
    else:
        slope = tl.where(log <= LOWEST, 0.0, log)
    return slope


@triton.jit
def tile(x, place, inside):
    """Some tokens' channels in float32, zeros beyond the end of the row."""
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def decays(w, fixed, place, inside, VERSION: tl.constexpr):
    """Of a chunk: its log decays (L, N), their cumulative sum from the middle g, and half of their total (1, N).

    fixed: the log decay (1, N) of WKV-5, whatever for the others, which have w at every token. Pads do not decay.
    """
    if VERSION == 5:
        logs = tl.where(inside, fixed, 0.0)
    else:
        logs = tl.where(inside, log_decay(tile(w, place, inside), VERSION), 0.0)
    middle = 0.5 * tl.sum(logs, axis=0)[None, :]
    return logs, tl.cumsum(logs, axis=0) - middle, middle


@triton.jit
def borders(pieces, piece):
    """Where a piece begins and ends among the tokens, and its row."""
    at = pieces + 4 * piece
    return tl.load(at), tl.load(at + 4), tl.load(at + 1)


@triton.jit
def first_piece(pieces, row):
    """That of a row; of the row after the last one, the number of pieces."""
    return tl.load(pieces + 4 * row + 2)


@triton.jit
def solver(a_up, b_down, lower, L: tl.constexpr, FINE: tl.constexpr):
    """(I - A_ab)^-1 of a chunk. lower: (L, L), whether j < i."""
    return inverse(tl.where(lower, fine(a_up, tl.trans(b_down), FINE), 0.0), L, FINE)


@triton.jit
def solved(X, S, V, a_up, k_down, half, lower, COARSE: tl.constexpr, FINE: tl.constexpr):
    """U of a chunk, from its `solver` X and the state before it."""
    A_ak = tl.where(lower, fine(a_up, tl.trans(k_down), FINE), 0.0)
    Z = coarse(A_ak, V, COARSE, FINE) + coarse(a_up * half, tl.trans(S), COARSE, FINE)
    return fine(X, Z, FINE)


@triton.jit
def state_after(S, V, U, k_down, b_down, middle, VERSION: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr):
    """The state after a chunk. U, b_down: whatever but for WKV-7."""
    half = tl.exp(middle)
    S = S * tl.exp(2.0 * middle) + coarse(tl.trans(V), k_down * half, COARSE, FINE)
    if VERSION == 7:
        S += coarse(tl.trans(U), b_down * half, COARSE, FINE)
    return S


@triton.jit
def solved_grad(dS, dY, r_up, b_down, half, upto, COARSE: tl.constexpr, FINE: tl.constexpr):
    """The gradient of U in a chunk; dS: that of the state after it; upto: (L, L), whether j <= i."""
    A_rb = tl.where(upto, fine(r_up, tl.trans(b_down), FINE), 0.0)
    return coarse(tl.trans(A_rb), dY, COARSE, FINE) + coarse(b_down * half, tl.trans(dS), COARSE, FINE)


@triton.jit
def grad_before(dS, dY, r_up, half, COARSE: tl.constexpr, FINE: tl.constexpr):
    """The gradient of the state before a chunk, without WKV-7's part of Z."""
    return dS * (half * half) + coarse(tl.trans(dY), r_up * half, COARSE, FINE)


@triton.jit
def forward(
    r,
    w,
    k,
    v,
    a,
    b,
    u,
    state,
    pieces,
    y,
    last,
    kept,
    H,
    VERSION: tl.constexpr,
    N: tl.constexpr,
    VB: tl.constexpr,
    L: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
):
    """y, the final state of rows, and with KEEP the state before each GROUP tokens. Grid: (pieces * H, N / VB).

    state: before each piece.
    """
    piece = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    begin, end, row = borders(pieces, piece)
    token = tl.arange(0, L)
    key = tl.arange(0, N)[None, :]
    value = (tl.program_id(1) * VB + tl.arange(0, VB))[None, :]
    square = tl.trans(value) * N + key  # places from a scalar beginning, in 32 bits: fewer registers
    keys = token[:, None] * (H * N) + key
    values = token[:, None] * (H * N) + value
    lower = token[:, None] > token[None, :]
    diagonal = token[:, None] == token[None, :]
    S = tl.load(state + (piece * H + head) * N * N + square)
    slot = begin // GROUP + row  # groups of all rows before this one fill fewer slots
    fixed = tl.zeros([1, N], tl.float32)
    if VERSION == 5:
        fixed = log_decay(tl.load(w + head * N + key), VERSION)
    if VERSION != 7:
        bonus = tl.load(u + head * N + key)
    for at in tl.range(begin, end, L, disable_licm=True):
        if KEEP:  # noqa: SIM102 - decided when compiled
            if (at - begin) % GROUP == 0:
                tl.store(kept + ((slot + (at - begin) // GROUP) * H + head) * N * N + square, S)
        inside = (at + token < end)[:, None]
        base = (at * H + head) * N
        R = tile(r + base, keys, inside)
        K = tile(k + base, keys, inside)
        V = tile(v + base, values, inside)
        logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
        half = tl.exp(middle)  # from the middle of the decay to either end
        k_down = K * tl.exp(-g)
        if VERSION == 7:
            r_up = R * tl.exp(g)
            a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
            b_down = tile(b + base, keys, inside) * tl.exp(-g)
            A_ab = tl.where(lower, fine(a_up, tl.trans(b_down), FINE), 0.0)
            A_ak = tl.where(lower, fine(a_up, tl.trans(k_down), FINE), 0.0)
            A_rk = tl.where(lower | diagonal, fine(r_up, tl.trans(k_down), FINE), 0.0)
            A_rb = tl.where(lower | diagonal, fine(r_up, tl.trans(b_down), FINE), 0.0)
            Z = coarse(A_ak, V, COARSE, FINE) + coarse(a_up * half, tl.trans(S), COARSE, FINE)
            U = fine(inverse(A_ab, L, FINE), Z, FINE)
            Y = coarse(r_up * half, tl.trans(S), COARSE, FINE) + coarse(A_rk, V, COARSE, FINE)
            Y += coarse(A_rb, U, COARSE, FINE)
            S = state_after(S, V, U, k_down, b_down, middle, VERSION, COARSE, FINE)
        else:
            r_up = R * tl.exp(g - logs)
            A_rk = tl.where(lower, fine(r_up, tl.trans(k_down), FINE), 0.0)
            own = tl.sum(R * bonus * K, axis=1)[:, None]
            Y = coarse(r_up * half, tl.trans(S), COARSE, FINE) + coarse(A_rk, V, COARSE, FINE) + own * V
            S = state_after(S, V, V, k_down, k_down, middle, VERSION, COARSE, FINE)
        tl.store(y + base + values, Y.to(y.dtype.element_ty), mask=inside)
    if piece + 1 == first_piece(pieces, row + 1):
        tl.store(last + (row * H + head) * N * N + square, S)


@triton.jit
def backward(
    r,
    w,
    k,
    v,
    a,
    b,
    u,
    kept,
    pieces,
    dy,
    dlast,
    dr,
    dw,
    dk,
    dv,
    da,
    db,
    du,
    dstate,
    states,
    inverses,
    sums,
    H,
    stride,
    VERSION: tl.constexpr,
    N: tl.constexpr,
    VB: tl.constexpr,
    L: tl.constexpr,
    GROUP: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
):
    """Gradients, in one sweep from the last group of tokens to the first. Grid: (pieces * H, N / VB).

    dlast: of the state after each piece; dstate: of the one before each row.
    Gradients by key channel are sums over value channels: each of the N / VB programs of a head writes its part,
    `stride` numbers after the part before. du and (WKV-5) dw: (pieces * H, N / VB, N), float32, to be summed over all
    pieces. states, inverses, sums: memory of each program for what is computed again within a group, (programs,
    GROUP / L, ...) of (VB, N), (L, L) and (L, VB) float32.
    """
    piece = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0).to(tl.int64) * (N // VB) + part
    begin, end, row = borders(pieces, piece)
    token = tl.arange(0, L)
    key = tl.arange(0, N)[None, :]
    local = tl.arange(0, VB)[None, :]
    value = tl.program_id(1) * VB + local
    square = tl.trans(value) * N + key  # places from a scalar beginning, in 32 bits: fewer registers
    keys = token[:, None] * (H * N) + key
    values = token[:, None] * (H * N) + value
    lower = token[:, None] > token[None, :]
    diagonal = token[:, None] == token[None, :]
    pairs = token[:, None] * L + token[None, :]
    own_square = tl.trans(local) * N + key
    own_values = token[:, None] * VB + local
    states += program * (GROUP // L) * VB * N
    inverses += program * (GROUP // L) * L * L
    sums += program * (GROUP // L) * L * VB
    dS = tl.load(dlast + (piece * H + head) * N * N + square)
    slot = begin // GROUP + row
    fixed = tl.zeros([1, N], tl.float32)
    if VERSION == 5:
        fixed_raw = tl.load(w + head * N + key)
        fixed = log_decay(fixed_raw, VERSION)
        dw_sum = tl.zeros([1, N], tl.float32)
    if VERSION != 7:
        bonus = tl.load(u + head * N + key)
        du_sum = tl.zeros([1, N], tl.float32)
    groups = (end - begin + GROUP - 1) // GROUP
    for step in tl.range(0, groups, disable_licm=True):
        group = groups - 1 - step
        first = begin + group * GROUP
        S = tl.load(kept + ((slot + group) * H + head) * N * N + square)
        # forwards through the group: the state before each chunk, and for WKV-7 the inverse and U
        for chunk in tl.range(0, GROUP // L, disable_licm=True):
            inside = (first + chunk * L + token < end)[:, None]
            base = ((first + chunk * L) * H + head) * N
            V = tile(v + base, values, inside)
            logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
            half = tl.exp(middle)
            k_down = tile(k + base, keys, inside) * tl.exp(-g)
            tl.store(states + chunk * VB * N + own_square, S)
            if VERSION == 7:
                a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
                b_down = tile(b + base, keys, inside) * tl.exp(-g)
                X = solver(a_up, b_down, lower, L, FINE)
                U = solved(X, S, V, a_up, k_down, half, lower, COARSE, FINE)
                tl.store(inverses + chunk * L * L + pairs, X)
                tl.store(sums + chunk * L * VB + own_values, U)
                S = state_after(S, V, U, k_down, b_down, middle, VERSION, COARSE, FINE)
            else:
                S = state_after(S, V, V, k_down, k_down, middle, VERSION, COARSE, FINE)
        tl.debug_barrier()  # what other threads of the program have stored is read now
        # And back; S is the state before a chunk, dS the gradient of the one after it. Inputs are read again after each
        # barrier rather than held, for which the registers do not suffice.
        for back in tl.range(0, GROUP // L, disable_licm=True):
            chunk = GROUP // L - 1 - back
            inside = (first + chunk * L + token < end)[:, None]
            base = ((first + chunk * L) * H + head) * N
            # gradients of U and V
            dY = tile(dy + base, values, inside)
            logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
            half = tl.exp(middle)
            R = tile(r + base, keys, inside)
            K = tile(k + base, keys, inside)
            k_down = K * tl.exp(-g)
            if VERSION == 7:
                r_up = R * tl.exp(g)
                b_down = tile(b + base, keys, inside) * tl.exp(-g)
                dU = solved_grad(dS, dY, r_up, b_down, half, lower | diagonal, COARSE, FINE)
                dZ = fine(tl.trans(tl.load(inverses + chunk * L * L + pairs)), dU, FINE)
                A_rk = tl.where(lower | diagonal, fine(r_up, tl.trans(k_down), FINE), 0.0)
                a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
                A_ak = tl.where(lower, fine(a_up, tl.trans(k_down), FINE), 0.0)
                dV = coarse(tl.trans(A_ak), dZ, COARSE, FINE) + coarse(tl.trans(A_rk), dY, COARSE, FINE)
            else:
                A_rk = tl.where(lower, fine(R * tl.exp(g - logs), tl.trans(k_down), FINE), 0.0)
                dV = coarse(tl.trans(A_rk), dY, COARSE, FINE) + tl.sum(R * bonus * K, axis=1)[:, None] * dY
            dV += coarse(k_down * half, tl.trans(dS), COARSE, FINE)
            tl.store(dv + base + values, dV.to(dv.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            # gradients of what reads the state: r and a
            dY = tile(dy + base, values, inside)
            V = tile(v + base, values, inside)
            logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
            half = tl.exp(middle)
            down = tl.exp(-g)
            S = tl.load(states + chunk * VB * N + own_square)
            # Decay gradients are sums over all pairs on either side of a token. Pairs across the ends of the chunk are
            # summed from their own side, those within as a running difference that ends at zero.
            across = half * half * tl.sum(S * dS, axis=0)[None, :]
            R = tile(r + base, keys, inside)
            k_down = tile(k + base, keys, inside) * down
            if VERSION == 7:
                U = tl.load(sums + chunk * L * VB + own_values)
                dA_rk = tl.where(lower | diagonal, fine(dY, tl.trans(V), FINE), 0.0)
                dA_rb = tl.where(lower | diagonal, fine(dY, tl.trans(U), FINE), 0.0)
                dA_ak = tl.where(lower, fine(dZ, tl.trans(V), FINE), 0.0)
                dA_ab = tl.where(lower, fine(dZ, tl.trans(U), FINE), 0.0)
                b_down = tile(b + base, keys, inside) * down
                dR = fine(dA_rk, k_down, FINE) + fine(dA_rb, b_down, FINE) + coarse(dY, S, COARSE, FINE) * half
                dR *= tl.exp(g)
                later = R * dR
                dA = fine(dA_ak, k_down, FINE) + fine(dA_ab, b_down, FINE) + coarse(dZ, S, COARSE, FINE) * half
                dA *= tl.exp(g - logs)
                read = tile(a + base, keys, inside) * dA  # from the state before the own token, whose decay it has not
                later += read
                tl.store(da + part * stride + base + keys, dA.to(da.dtype.element_ty), mask=inside)
            else:
                dA_rk = tl.where(lower, fine(dY, tl.trans(V), FINE), 0.0)
                dR = (fine(dA_rk, k_down, FINE) + coarse(dY, S, COARSE, FINE) * half) * tl.exp(g - logs)
                read = R * dR
                later = read
                own = tl.sum(dY * V, axis=1)[:, None]
                dR += own * bonus * tile(k + base, keys, inside)
            tl.store(dr + part * stride + base + keys, dR.to(dr.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            # gradients of what is written to the state: k and b
            V = tile(v + base, values, inside)
            logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
            down = tl.exp(-g)
            half = tl.exp(middle)
            R = tile(r + base, keys, inside)
            K = tile(k + base, keys, inside)
            dK_state = coarse(V, dS, COARSE, FINE) * (down * half)
            written = K * dK_state
            if VERSION == 7:
                U = tl.load(sums + chunk * L * VB + own_values)
                r_up = R * tl.exp(g)
                a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
                dK = (fine(tl.trans(dA_rk), r_up, FINE) + fine(tl.trans(dA_ak), a_up, FINE)) * down
                B = tile(b + base, keys, inside)
                dB = (fine(tl.trans(dA_rb), r_up, FINE) + fine(tl.trans(dA_ab), a_up, FINE)) * down
                dB_state = coarse(U, dS, COARSE, FINE) * (down * half)
                later -= K * dK + B * dB
                written += B * dB_state
                tl.store(db + part * stride + base + keys, (dB + dB_state).to(db.dtype.element_ty), mask=inside)
                dK += dK_state
            else:
                r_up = R * tl.exp(g - logs)
                dK = fine(tl.trans(dA_rk), r_up, FINE) * down
                later -= K * dK
                dK += dK_state + own * bonus * R
                du_sum += tl.sum(own * R * K, axis=0)[None, :]
            tl.store(dk + part * stride + base + keys, dK.to(dk.dtype.element_ty), mask=inside)
            dlogs = across + tl.cumsum(later, axis=0, reverse=True) - read + tl.cumsum(written, axis=0) - written
            if VERSION == 5:
                dw_sum += tl.sum(tl.where(inside, dlogs, 0.0), axis=0)[None, :]
            else:
                dW = dlogs * log_decay_slope(tile(w + base, keys, inside), VERSION)
                tl.store(dw + part * stride + base + keys, dW.to(dw.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            # gradient of the state before the chunk
            dY = tile(dy + base, values, inside)
            logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
            half = tl.exp(middle)
            R = tile(r + base, keys, inside)
            if VERSION == 7:
                dS = grad_before(dS, dY, R * tl.exp(g), half, COARSE, FINE)
                a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
                dS += coarse(tl.trans(dZ), a_up * half, COARSE, FINE)
            else:
                dS = grad_before(dS, dY, R * tl.exp(g - logs), half, COARSE, FINE)
        tl.debug_barrier()  # all have read before the next group overwrites
    if piece == first_piece(pieces, row):
        tl.store(dstate + (row * H + head) * N * N + square, dS)
    if VERSION == 5:
        tl.store(dw + program * N + key, dw_sum * log_decay_slope(fixed_raw, VERSION))
    if VERSION != 7:
        tl.store(du + program * N + key, du_sum)
