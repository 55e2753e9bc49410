// Decoding on the CPU, one token of each of a few rows: what the operations of a program share. ops/decode.py writes
// the programs. Activations between operations are float32, arithmetic too.
//
// Letters: R rows, C width, A attention width, H heads, N head size, M mixes, D inner size of a low-rank vector.
#pragma once

#include <thread>

#include "products.h"
#include "threads.h"

namespace rwkv {
namespace {

constexpr int COLUMNS = 32;   // of a matrix (in, out) that are summed together; head sizes are multiples of it
constexpr int ROWS = 8;       // of x that a task takes, where it takes several
constexpr int LARGEST = 128;  // head size

// What is done with a product before it is written, by the numbers of ops/decode.py.
enum Finish { PLAIN, RELU_SQUARED, SIGMOID, TANH, SILU, ADDED, ADDED_GATED };

// One operation: a record of 36 words, as ops/decode.py packs it.
struct Op {
    int64_t kind;
    int64_t after;   // 1: it begins when all before it are finished
    int64_t stored;  // how its matrices are stored, or the token-shift state
    int64_t finish;
    double eps;
    int64_t sizes[7];
    void* tensors[24];

    template <typename T = const float>
    T* at(int i) const {
        return static_cast<T*>(tensors[i]);
    }
};

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline float finished(int64_t finish, float x) {
    switch (finish) {
        case RELU_SQUARED:
            return x < 0.f ? 0.f : x * x;
        case SIGMOID:
            return 1.f / (1.f + std::exp(-x));
        case TANH:
            return std::tanh(x);
        case SILU:
            return x / (1.f + std::exp(-x));
        default:
            return x;
    }
}

// f(a pointer to the call's matrices of `stored` numbers)
template <typename F>
void by_stored(const Op& op, const F& f) {
    if (op.stored == BFLOAT16)
        f(static_cast<const bf16*>(nullptr));
    else
        f(static_cast<const float*>(nullptr));
}

// y[r][c] = sum_i x[r][i] w[i][c] for the first COLUMNS columns of w, whose rows are `stride` apart. Blocks of 64 terms
// are summed by themselves: fewer roundings follow one another.
template <int R, typename T>
INLINE void columns(const float* x, int64_t x_stride, const T* w, int64_t stride, int64_t n, float* y,
                    int64_t y_stride) {
    constexpr int V = COLUMNS / W;
    vec total[R][V] = {};
    for (int64_t begin = 0; begin < n; begin += 64) {
        vec part[R][V] = {};
        for (int64_t i = begin; i < std::min(n, begin + 64); ++i) {
            vec weights[V];
            for (int c = 0; c < V; ++c) weights[c] = load(w + i * stride + c * W);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < V; ++c) part[r][c] += x[r * x_stride + i] * weights[c];
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < V; ++c) total[r][c] += part[r][c];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < V; ++c) store(y + r * y_stride + c * W, total[r][c]);
}

// The same for some rows and for `count` columns, which may be fewer than COLUMNS.
template <typename T>
void some_columns(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t stride, int64_t n, float* y,
                  int64_t y_stride, int64_t count) {
    if (count < COLUMNS) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < count; ++c) {
                float total = 0;
                for (int64_t begin = 0; begin < n; begin += 64) {
                    float part = 0;
                    for (int64_t i = begin; i < std::min(n, begin + 64); ++i)
                        part += x[r * x_stride + i] * widen(w[i * stride + c]);
                    total += part;
                }
                y[r * y_stride + c] = total;
            }
        return;
    }
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) columns<2>(x + r * x_stride, x_stride, w, stride, n, y + r * y_stride, y_stride);
    if (r < rows) columns<1>(x + r * x_stride, x_stride, w, stride, n, y + r * y_stride, y_stride);
}

// Of one task of an operation over heads: which head, and which rows.
struct HeadTask {
    int64_t head, first, rows;  // rows: how many

    HeadTask(int64_t task, int64_t all_rows) {
        const int64_t chunks = parts(all_rows, ROWS);  // of one head one after the other: they share its matrices
        head = task / chunks, first = task % chunks * ROWS, rows = std::min<int64_t>(ROWS, all_rows - first);
    }
};

// y = (y - mean) / sqrt(var + eps) * weight + bias over n numbers, n a multiple of W
INLINE void normalise(float* y, int64_t n, const float* weight, const float* bias, float eps) {
    vec total = splat(0), squares = splat(0);
    for (int64_t j = 0; j < n; j += W) total += load(y + j);
    const float mean = sum(total) / static_cast<float>(n);
    for (int64_t j = 0; j < n; j += W) {
        const vec centred = load(y + j) - mean;
        squares += centred * centred;
    }
    const float inverse = 1.f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
    for (int64_t j = 0; j < n; j += W) store(y + j, (load(y + j) - mean) * inverse * load(weight + j) + load(bias + j));
}

}  // namespace
}  // namespace rwkv
