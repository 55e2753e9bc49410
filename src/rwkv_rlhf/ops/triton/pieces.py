"""Long rows of the recurrences with a matrix state, cut into pieces that run side by side.

The state after a piece is linear in the one before it. With D_t the diagonal of a token's decays:

    S' = S M + K      WKV-7: M = prod_t (D_t + a_t b_t^T)     WKV-5, 6: M = prod_t D_t, diagonal
    dS = dS' M^T + G  for the gradients of both, where G comes from the piece's own y

K and M are what the chunks of matrix_state.py make of no state, and of the identity without v. So all pieces run once
for K and M (`sweep`), each row's states pass through its pieces one after the other (`join`), and all pieces run again
as rows of their own, from the right states. Backward the same, from the last piece to the first. This is the scan of
linear recurrences by blocks (Blelloch, CMU-CS-90-190).

Legend and `pieces`: matrix_state.py. maps: float32, one for each of J joints, pieces that another of their row follows,
(J, H, 2 N, N) of WKV-7, K above M, and (J, H, N + 1, N) of the others, whose last row is the logarithm of M's diagonal.
"""

import triton
import triton.language as tl

from rwkv_rlhf.ops.triton.matrix_state import (
    borders,
    decays,
    first_piece,
    grad_before,
    log_decay,
    solved,
    solved_grad,
    solver,
    state_after,
    tile,
)
from rwkv_rlhf.ops.triton.products import coarse, fine


@triton.jit
def sweep(
    r,
    w,
    k,
    v,
    a,
    b,
    pieces,
    maps,
    H,
    VERSION: tl.constexpr,
    N: tl.constexpr,
    VB: tl.constexpr,
    L: tl.constexpr,
    BACK: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
):
    """K and M of each piece before a joint; with BACK, where v is dy, G and M^T of each one behind it.

    Grid: (J * H, N / VB). A program has VB rows of K, and of WKV-7 as many of M, which share all products of keys.
    """
    ROWS: tl.constexpr = 2 * VB if VERSION == 7 else VB
    joint = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    piece = tl.load(pieces + 4 * joint + 3)
    if BACK:
        piece += 1
    begin, end, _ = borders(pieces, piece)
    token = tl.arange(0, L)
    key = tl.arange(0, N)[None, :]
    lane = tl.arange(0, ROWS)[None, :]
    value = tl.program_id(1) * VB + lane % VB
    of_values = lane < VB
    lower = token[:, None] > token[None, :]
    diagonal = token[:, None] == token[None, :]
    keys = token[:, None] * (H * N) + key
    values = token[:, None] * (H * N) + value
    S = tl.where(tl.trans(of_values), 0.0, tl.where(tl.trans(value) == key, 1.0, 0.0))
    fixed = tl.zeros([1, N], tl.float32)
    if VERSION == 5:
        fixed = log_decay(tl.load(w + head * N + key), VERSION)
    total = tl.zeros([1, N], tl.float32)
    chunks = (end - begin + L - 1) // L
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - step if BACK else step
        inside = (begin + chunk * L + token < end)[:, None]
        base = ((begin + chunk * L) * H + head) * N
        V = tile(v + base, values, inside & of_values)
        logs, g, middle = decays(w + base, fixed, keys, inside, VERSION)
        half = tl.exp(middle)
        if VERSION == 7:
            a_up = tile(a + base, keys, inside) * tl.exp(g - logs)
            b_down = tile(b + base, keys, inside) * tl.exp(-g)
            X = solver(a_up, b_down, lower, L, FINE)
            if BACK:
                r_up = tile(r + base, keys, inside) * tl.exp(g)
                dZ = fine(tl.trans(X), solved_grad(S, V, r_up, b_down, half, lower | diagonal, COARSE, FINE), FINE)
                S = grad_before(S, V, r_up, half, COARSE, FINE) + coarse(tl.trans(dZ), a_up * half, COARSE, FINE)
            else:
                k_down = tile(k + base, keys, inside) * tl.exp(-g)
                U = solved(X, S, V, a_up, k_down, half, lower, COARSE, FINE)
                S = state_after(S, V, U, k_down, b_down, middle, VERSION, COARSE, FINE)
        else:
            total += 2.0 * middle
            if BACK:
                r_up = tile(r + base, keys, inside) * tl.exp(g - logs)
                S = grad_before(S, V, r_up, half, COARSE, FINE)
            else:
                k_down = tile(k + base, keys, inside) * tl.exp(-g)
                S = state_after(S, V, V, k_down, k_down, middle, VERSION, COARSE, FINE)
    if VERSION == 7:
        maps += (joint * H + head) * (2 * N * N)
        tl.store(maps + tl.trans(tl.where(of_values, value, N + value)) * N + key, S)
    else:
        maps += (joint * H + head) * ((N + 1) * N)
        tl.store(maps + tl.trans(value) * N + key, S)
        tl.store(maps + N * N + key, total)  # of every part the same


@triton.jit
def join(
    state,
    maps,
    pieces,
    found,
    H,
    VERSION: tl.constexpr,
    N: tl.constexpr,
    VB: tl.constexpr,
    BACK: tl.constexpr,
    FINE: tl.constexpr,
):
    """The state before each piece, from those before rows; with BACK the gradient of the state after each piece.

    Grid: (rows * H, N / VB).
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    first = first_piece(pieces, row)
    end = first_piece(pieces, row + 1)
    key = tl.arange(0, N)[None, :]
    value = tl.program_id(1) * VB + tl.arange(0, VB)
    square = value[:, None] * N + key
    whole = tl.arange(0, N)[:, None] * N + key
    S = tl.load(state + (row * H + head) * N * N + square)
    piece = end - 1 if BACK else first
    for _ in range(first + 1, end):
        tl.store(found + (piece * H + head) * N * N + square, S)
        if BACK:
            piece -= 1
        joint = piece - row  # rows before this one have a joint less than pieces, each
        if VERSION == 7:
            place = maps + (joint * H + head) * (2 * N * N)
            S = fine(S, tl.load(place + N * N + whole), FINE) + tl.load(place + square)
        else:
            place = maps + (joint * H + head) * ((N + 1) * N)
            S = S * tl.exp(tl.load(place + N * N + key)) + tl.load(place + square)
        if not BACK:
            piece += 1
    tl.store(found + (piece * H + head) * N * N + square, S)
