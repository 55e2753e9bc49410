// How the vectors of a head are shared out over the threads of a block, and one token of WKV-6 and 5.2 (wkv56.h has the
// letters and the recurrence).
#pragma once

#include "device.h"

namespace rwkv {
namespace {

constexpr int L = 8;            // tokens in shared memory at a time; divides INTERVAL
constexpr int VECTORS = 2;      // rows (or columns) of a thread
constexpr int REGISTERS = 128;  // more where blocks are few anyway

// How the vectors of a head are shared out.
template <int N>
struct Tile {
    static constexpr int LANES = N > 64 ? N / 16 : 4;  // threads along a vector
    static constexpr int PIECES = N / LANES / 4;       // each has so many runs of 4 numbers, LANES * 4 apart
    static constexpr int WHOLE = N < 64 ? N : 64;      // vectors of a block
    static constexpr int SPLIT = 32;                   // the same when there would be too few blocks

    // Index along a vector of the first number in a run.
    static DEVICE int at(int piece) { return (piece * LANES + thread_index() % LANES) * 4; }
};

// Threads of a block that holds OWN vectors.
template <int N, int OWN>
constexpr int threads = OWN / VECTORS * Tile<N>::LANES;

// L tokens of COLUMNS numbers each, on the way from memory to shared memory: 4 numbers a thread and step.
template <int COLUMNS, int THREADS, typename T>
struct Fetch {
    static constexpr int STEPS = (L * COLUMNS / 4 + THREADS - 1) / THREADS;
    Pack<4, T> raw[STEPS];

    static DEVICE int token(int step) { return (step * THREADS + thread_index()) / (COLUMNS / 4); }
    static DEVICE int column() { return thread_index() % (COLUMNS / 4) * 4; }

    // Tokens from .. from + count * stride; the others are zeros.
    DEVICE void read(const T* from, int64_t stride, int count) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            raw[step] = {};
            if (token(step) < count)
                raw[step] = *reinterpret_cast<const Pack<4, T>*>(from + token(step) * stride + column());
        }
    }

    DEVICE Pack<4> wide(int step) const {
        Pack<4> x;
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = widen(raw[step][e]);
        return x;
    }

    // f(four numbers) to to[token][column].
    template <typename F>
    DEVICE void put(float (*to)[COLUMNS], F&& f) const {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            if (token(step) < L) store(to[token(step)] + column(), f(wide(step)));
    }

    DEVICE void put(float (*to)[COLUMNS]) const {
        put(to, [](const Pack<4>& x) { return x; });
    }
};

// sums[token] = sum over columns of scale * x * y; every thread of the block must come here.
template <int COLUMNS, int THREADS, typename T>
DEVICE void dot_products(const Fetch<COLUMNS, THREADS, T>& x, const Fetch<COLUMNS, THREADS, T>& y, const Pack<4>& scale,
                         float* sums) {
    static_assert(COLUMNS / 4 <= 32 && THREADS % (COLUMNS / 4) == 0);
#pragma unroll
    for (int step = 0; step < x.STEPS; ++step) {
        const Pack<4> a = x.wide(step), b = y.wide(step);
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += scale[e] * a[e] * b[e];
        sum = sum_over<1, COLUMNS / 4>(sum);
        if (x.column() == 0 && x.token(step) < L) sums[x.token(step)] = sum;
    }
}

DEVICE Pack<4> log_decay(const Pack<4>& w) {
    Pack<4> x;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = -expf(w[e]);
    return x;
}

DEVICE Pack<4> exponential(const Pack<4>& log) {
    Pack<4> x;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = expf(log[e]);
    return x;
}

// The matrix vectors of a thread: number 4 * piece + e of vector v is that at Tile::at(piece) + e.
template <int N>
using Matrix = float[VECTORS][Tile<N>::PIECES * 4];

// out[v] = x . M[v], then M[v] = M[v] * decay + add * scale[v], of vectors that lie in shared memory, along rows.
template <int N>
DEVICE float row_step(Matrix<N>& m, const float* x, const float* add, const float* decay, const Pack<VECTORS>& scale) {
    float out[VECTORS] = {};
#pragma unroll
    for (int piece = 0; piece < Tile<N>::PIECES; ++piece) {
        const int at = Tile<N>::at(piece);
        const Pack<4> x4 = load<4>(x + at), add4 = load<4>(add + at), decay4 = load<4>(decay + at);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& s = m[v][piece * 4 + e];
                out[v] += s * x4[e];
                s = s * decay4[e] + add4[e] * scale[v];
            }
    }
    return scatter_sum<VECTORS, 1, Tile<N>::LANES>(out);
}

// The same along columns: decay and scale belong to the vectors.
template <int N>
DEVICE float column_step(Matrix<N>& m, const float* x, const float* add, const Pack<VECTORS>& decay,
                         const Pack<VECTORS>& scale) {
    float out[VECTORS] = {};
#pragma unroll
    for (int piece = 0; piece < Tile<N>::PIECES; ++piece) {
        const int at = Tile<N>::at(piece);
        const Pack<4> x4 = load<4>(x + at), add4 = load<4>(add + at);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& s = m[v][piece * 4 + e];
                out[v] += s * x4[e];
                s = s * decay[v] + add4[e] * scale[v];
            }
    }
    return scatter_sum<VECTORS, 1, Tile<N>::LANES>(out);
}

}  // namespace
}  // namespace rwkv
