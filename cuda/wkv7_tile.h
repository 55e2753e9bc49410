// How the threads of a block share a piece of the state, and one token of WKV-7 (wkv7.cu has the letters and the
// recurrence).
#pragma once

#include "device.h"

namespace rwkv {
namespace {

// For 64 x 64 numbers in 64 threads `rows` needs a little more than 128; the next step of a multiprocessor is 168.
constexpr int REGISTERS = 128, WIDE_REGISTERS = 168;

// How the threads of a block share an N by (SLOTS R) tile. Threads that differ in their lowest bits have other rows of
// the same piece, so that the 8 threads whose 16-byte reads are served together want at most 2 places.
template <int N>
struct Tile {
    static constexpr int THREADS = N == 128 ? 128 : 64;
    static constexpr int PIECE = N == 32 ? 8 : 16;  // in packs of 4, each 4 * PARTS after the last
    static constexpr int PARTS = N / PIECE;
    static constexpr int LOW = 32 / PARTS;  // sums run over the thread bits LOW .. 16
    static constexpr int SLOTS = THREADS / PARTS;
    static constexpr int R = N == 32 ? 2 : 4;  // rows of a thread

    int slot, first;  // of a thread: its rows are slot * R .., its piece begins at first
    DEVICE explicit Tile(int thread) : slot(thread / 32 * LOW + thread % LOW), first(thread / LOW % PARTS * 4) {}
};

// ---------------------------------------------------------------- the stage

struct Decay {
    float value, slope;  // d = exp(-DECAY_RATE sigmoid(w)), d(log d)/dw
};

// In bits of d, exp2_fast and reciprocal_fast are off by no more than rounding d is. w = -infinity gives 1 and 0.
DEVICE Decay decay_of(float w) {
    const float q = exp2_fast(-fabsf(w) * LOG2E), inverse = reciprocal_fast(1.f + q);
    return {exp2_fast((w < 0 ? q * inverse : inverse) * (-DECAY_RATE * LOG2E)), -DECAY_RATE * q * inverse * inverse};
}

// What stands for a token that is not there: no decay, and zeros.
template <typename T>
DEVICE T missing(bool decay) {
    T x;
    narrow(decay ? -INFINITY : 0.f, x);
    return x;
}

// ---------------------------------------------------------------- one token

// M = M d + x A^T + u U^T, then y = M Y and z = M X, for this thread's R rows and piece of M. d belongs to the piece
// (ALONG) or to the rows. The vectors are given from the first number of the thread.
template <int N, bool ALONG, int R>
DEVICE void advance(float (&m)[R][Tile<N>::PIECE], const float* d, const float* A, const float* U, const float* Y,
                    const float* X, const float* x, const Pack<R>& u, float (&y)[R], float (&z)[R]) {
    constexpr int PIECE = Tile<N>::PIECE, PARTS = Tile<N>::PARTS;
    Pack<R> d_row;
    if constexpr (!ALONG) d_row = load<R>(d);
#pragma unroll
    for (int r = 0; r < R; ++r) y[r] = z[r] = 0.f;
#pragma unroll
    for (int c = 0; c < PIECE; c += 4) {
        const int at = c * PARTS;
        Pack<4> d_piece;
        if constexpr (ALONG) d_piece = load<4>(d + at);
        const Pack<4> A_ = load<4>(A + at), U_ = load<4>(U + at), Y_ = load<4>(Y + at), X_ = load<4>(X + at);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float& cell = m[r][c + e];
                cell = cell * (ALONG ? d_piece[e] : d_row[r]) + u[r] * U_[e];
                cell += x[r] * A_[e];
                y[r] += cell * Y_[e];
                z[r] += cell * X_[e];
            }
    }
}

}  // namespace
}  // namespace rwkv
