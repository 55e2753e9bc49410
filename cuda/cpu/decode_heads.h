// One token of the recurrences with a matrix state for each head, the norm of each head behind them, and the gate.
// The states (R, H, N_value, N_key) are changed in place.
#pragma once

#include "decode.h"

namespace rwkv {
namespace {

// What they have in common: the first sizes are rows, heads, N.
struct Heads {
    const Op& op;
    int64_t rows, heads, N, A;

    explicit Heads(const Op& x)
        : op(x), rows(x.sizes[0]), heads(x.sizes[1]), N(x.sizes[2]), A(x.sizes[1] * x.sizes[2]) {}

    int64_t tasks() const { return heads * parts(rows, ROWS); }
};

// RWKV-7. sizes: rows, heads, N, then D of w, a, v, g. tensors: r, k, v, v_first (null in block 0) (R, A) | inner
// vectors w, a, v, g (R, D) | their matrices (D, A) | w0, a0, v0, k_k, k_a, r_k, weight and bias of ln_x (A) | state, y
struct Heads7 : Heads {
    using Heads::Heads;

    void run(int64_t number) const {
        const HeadTask task(number, rows);
        float low_rank[4][ROWS][LARGEST];
        by_stored(op, [&](auto type) {
            for (int i = 0; i < 4; ++i) {
                const int64_t D = op.sizes[3 + i];
                if (!op.at(8 + i)) continue;
                for (int64_t c = 0; c < N; c += COLUMNS)
                    some_columns(op.at(4 + i) + task.first * D, D, task.rows,
                                 static_cast<decltype(type)>(op.tensors[8 + i]) + task.head * N + c, A, D,
                                 &low_rank[i][0][c], LARGEST, COLUMNS);
            }
        });
        for (int64_t r = 0; r < task.rows; ++r)
            row(task.first + r, task.head * N, low_rank[0][r], low_rank[1][r], low_rank[2][r], low_rank[3][r]);
    }

    void row(int64_t number, int64_t c, const float* w, const float* a, const float* gate, const float* g) const {
        const int64_t n = N, at = number * A + c;
        const float *r = op.at(0) + at, *k = op.at(1) + at;
        const float *r_k = op.at(17) + c, *k_a = op.at(16) + c, *k_k = op.at(15) + c, *w0 = op.at(12) + c;
        const float *a0 = op.at(13) + c, *v0 = op.at(14) + c;
        float decay[LARGEST], rate[LARGEST], unit[LARGEST], key[LARGEST], v[LARGEST], y[LARGEST];
        vec squares = splat(0), bonuses = splat(0);
        for (int64_t j = 0; j < n; j += W) {
            store(decay + j, exp_in_range(-DECAY_RATE * sigmoid(load(w0 + j) + load(w + j))));
            const vec rates = sigmoid(load(a0 + j) + load(a + j)), keys = load(k + j), scaled = keys * load(k_k + j);
            const vec replaced = keys * (1.f + (rates - 1.f) * load(k_a + j));
            store(rate + j, rates), store(unit + j, scaled), store(key + j, replaced);
            squares += scaled * scaled;
            bonuses += load(r + j) * replaced * load(r_k + j);
            vec value = load(op.at(2) + at + j);
            if (op.at(3)) value += (load(op.at(3) + at + j) - value) * sigmoid(load(v0 + j) + load(gate + j));
            store(v + j, value);
        }
        const float inverse = 1.f / std::max(std::sqrt(sum(squares)), 1e-12f), bonus = sum(bonuses);
        for (int64_t j = 0; j < n; j += W) {
            const vec normed = load(unit + j) * inverse;
            store(unit + j, normed), store(rate + j, normed * load(rate + j));
        }
        float* state = op.at<float>(20) + at * n;
        for (int64_t i = 0; i < n; i += W, state += W * n) {  // W rows of the state
            vec found[W];
            for (int l = 0; l < W; ++l) {
                found[l] = splat(0);
                for (int64_t j = 0; j < n; j += W) found[l] += load(state + l * n + j) * load(unit + j);
            }
            float removed[W];
            store(removed, row_sums(found));
            for (int l = 0; l < W; ++l) {
                found[l] = splat(0);
                for (int64_t j = 0; j < n; j += W) {
                    float* p = state + l * n + j;
                    const vec next = load(p) * load(decay + j) - removed[l] * load(rate + j) + v[i + l] * load(key + j);
                    store(p, next);
                    found[l] += next * load(r + j);
                }
            }
            store(y + i, row_sums(found));
        }
        normalise(y, n, op.at(18) + c, op.at(19) + c, static_cast<float>(op.eps));
        float* out = op.at<float>(21) + at;
        for (int64_t j = 0; j < n; j += W) store(out + j, (load(y + j) + bonus * load(v + j)) * load(g + j));
    }
};

// RWKV-5 and 6. sizes: rows, heads, N, D. tensors: r, k, v (R, A) | inner vector of the decay (R, D) and its matrix
// (D, A), or null | raw decay, bonus, weight and bias of ln_x (A) | gate (R, A) or null | state, y
struct Heads6 : Heads {
    using Heads::Heads;

    void run(int64_t number) const {
        const HeadTask task(number, rows);
        float low_rank[ROWS][LARGEST] = {};
        if (op.at(4))
            by_stored(op, [&](auto type) {
                const int64_t D = op.sizes[3];
                for (int64_t c = 0; c < N; c += COLUMNS)
                    some_columns(op.at(3) + task.first * D, D, task.rows,
                                 static_cast<decltype(type)>(op.tensors[4]) + task.head * N + c, A, D, &low_rank[0][c],
                                 LARGEST, COLUMNS);
            });
        for (int64_t r = 0; r < task.rows; ++r) row(task.first + r, task.head * N, low_rank[r]);
    }

    void row(int64_t number, int64_t c, const float* w) const {
        const int64_t n = N, at = number * A + c;
        const float *r = op.at(0) + at, *k = op.at(1) + at, *v = op.at(2) + at;
        float decay[LARGEST], y[LARGEST];
        vec bonuses = splat(0);
        for (int64_t j = 0; j < n; j += W) {
            store(decay + j, exp_decay(-exp(load(op.at(5) + c + j) + load(w + j))));
            bonuses += load(r + j) * load(op.at(6) + c + j) * load(k + j);
        }
        const float bonus = sum(bonuses);
        float* state = op.at<float>(10) + at * n;
        for (int64_t i = 0; i < n; i += W, state += W * n) {
            vec found[W];
            for (int l = 0; l < W; ++l) {
                found[l] = splat(0);
                for (int64_t j = 0; j < n; j += W) {
                    float* p = state + l * n + j;
                    const vec before = load(p);
                    found[l] += before * load(r + j);
                    store(p, before * load(decay + j) + v[i + l] * load(k + j));
                }
            }
            store(y + i, row_sums(found) + bonus * load(v + i));
        }
        normalise(y, n, op.at(7) + c, op.at(8) + c, static_cast<float>(op.eps));
        float* out = op.at<float>(11) + at;
        for (int64_t j = 0; j < n; j += W)
            store(out + j, op.at(9) ? load(y + j) * load(op.at(9) + at + j) : load(y + j));
    }
};

// RWKV-4. sizes: rows, A. tensors: k, v, receptance behind its sigmoid (R, A) | raw decay, bonus (A) | state (R, A, 3),
// y
struct Channels4 {
    static constexpr int64_t BLOCK4 = 64;
    const Op& op;
    int64_t rows, A;

    explicit Channels4(const Op& x) : op(x), rows(x.sizes[0]), A(x.sizes[1]) {}

    int64_t tasks() const { return rows * parts(A, BLOCK4); }

    void run(int64_t task) const {
        const int64_t blocks = parts(A, BLOCK4), c = task % blocks * BLOCK4, at = task / blocks * A + c;
        const int64_t n = std::min(BLOCK4, A - c);
        float* state = op.at<float>(5) + at * 3;
        float sums[3][BLOCK4] = {};
        for (int64_t i = 0; i < n; ++i)
            for (int s = 0; s < 3; ++s) sums[s][i] = state[3 * i + s];
        each(n, [&](int64_t i, auto lanes) {
            const vec k = load(op.at(0) + at + i, lanes), v = load(op.at(1) + at + i, lanes);
            const vec d = -exp(load(op.at(3) + c + i, lanes)), now = k + load(op.at(4) + c + i, lanes);
            const vec p = load(sums[0] + i), q = load(sums[1] + i), scale = load(sums[2] + i);
            vec top = scale > now ? scale : now;
            vec old = exp_decay(scale - top), fresh = exp_decay(now - top);
            const vec y = (p * old + fresh * v) / (q * old + fresh);
            store(op.at<float>(6) + at + i, y * load(op.at(2) + at + i, lanes), lanes);
            const vec faded = scale + d;
            top = faded > k ? faded : k;
            old = exp_decay(faded - top), fresh = exp_decay(k - top);
            store(sums[0] + i, p * old + fresh * v);
            store(sums[1] + i, q * old + fresh);
            store(sums[2] + i, top);
        });
        for (int64_t i = 0; i < n; ++i)
            for (int s = 0; s < 3; ++s) state[3 * i + s] = sums[s][i];
    }
};

}  // namespace
}  // namespace rwkv
