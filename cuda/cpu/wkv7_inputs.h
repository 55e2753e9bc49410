// WKV-7 on the CPU: the inputs of a block of tokens in the scale that makes the decay vanish. Letters as in wkv7.cpp.
#pragma once

#include "recurrence.h"

namespace rwkv {
namespace {

constexpr int BLOCK = 16;  // tokens that share one origin of the cumulative decay
static_assert(INTERVAL % BLOCK == 0);
constexpr int RV = 32;                   // value rows that backward handles together; a multiple of W
constexpr int MAX_VB = W == 16 ? 4 : 2;  // registers of values per forward sweep
constexpr int KB = W == 16 ? 2 : 1;      // registers of keys per backward sweep

template <typename T>
struct Inputs {
    const T *r, *w, *k, *v, *a, *b;
};

// exp(z) for z in [-DECAY_RATE, DECAY_RATE], by its series about the nearer half.
INLINE vec exp_small(vec z) {
    vec p = splat(1.f / 362880);
    for (float c : {1.f / 40320, 1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = p * z + c;
    return p;
}

// The rescaled inputs of up to BLOCK tokens.
template <int N>
struct Prepared {
    float *r, *k, *b;  // [token][N]
    float* a_next;     // [token][N]: a~ of the following token in this block's scale; zeros after the last token
    float *P, *inverse, *slope;  // backward only: P_t, 1 / P_t, d(log decay)/dw
};

// Fill `out` for tokens first .. first + n of a run; returns P after them in P_end. Asks for the tokens that come next,
// which lie far from each other: no hardware foresees them.
template <int N, bool BACKWARD, typename T>
INLINE void prepare(const Inputs<T>& x, const Run& run, int64_t first, int n, const Prepared<N>& out, float* P_end) {
    const int64_t ahead = (BACKWARD ? -INTERVAL : BLOCK) * run.stride;
    for (int j = 0; j < N; j += W) {
        vec P = splat(1.f), inverse = splat(1.f);
        int64_t at = run.first + first * run.stride + j;
        for (int t = 0; t < n; ++t, at += run.stride) {
            for (const T* input : {x.r, x.w, x.k, x.v, x.a, x.b}) __builtin_prefetch(input + at + ahead);
            const vec s = sigmoid(load(x.w + at));
            P *= exp_small(-DECAY_RATE * s);
            inverse *= exp_small(DECAY_RATE * s);
            const int to = t * N + j;
            store(out.r + to, load(x.r + at) * P);
            store(out.k + to, load(x.k + at) * inverse);
            store(out.b + to, load(x.b + at) * inverse);
            store(out.a_next + to, first + t + 1 < run.tokens ? load(x.a + at + run.stride) * P : splat(0.f));
            if constexpr (BACKWARD) {
                store(out.P + to, P);
                store(out.inverse + to, inverse);
                store(out.slope + to, -DECAY_RATE * s * (1.f - s));
            }
        }
        store(P_end + j, P);
    }
}

}  // namespace
}  // namespace rwkv
