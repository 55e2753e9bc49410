// Groups of tokens of WKV-6 and WKV-5.2 on the CPU: what needs no state. Letters and formulas are those of wkv56.h.
#pragma once

#include "recurrence.h"

namespace rwkv {
namespace {

constexpr int GROUP = 4;
constexpr int GROUPS = INTERVAL / GROUP;
constexpr int PAIRS = GROUP * (GROUP + 1) / 2;
constexpr int SLOTS = 16;  // PAIRS, and lanes to fill a register
static_assert(INTERVAL % GROUP == 0 && PAIRS <= SLOTS && SLOTS % W == 0);
constexpr int ROWS = 4;                    // of a tile
constexpr int MAX_VECS = W == 16 ? 4 : 2;  // registers of a row of a tile

constexpr int pair(int s, int t) { return t * (t + 1) / 2 + s; }  // of tokens s <= t of a group

// w is per token for WKV-6, one token's vector for WKV-5.2.
template <typename T, bool PER_TOKEN>
struct Inputs {
    const T *r, *k, *v;
    std::conditional_t<PER_TOKEN, const T*, const float*> w;
    const float* u;

    auto tokens() const {
        if constexpr (PER_TOKEN)
            return std::array{r, k, v, w};
        else
            return std::array{r, k, v};
    }
};

// Everything one thread needs for one interval of one run, all in float32.
template <int N>
struct Interval {
    using Tokens = float[INTERVAL * N];
    alignas(64) Tokens er, kf, v;         // e_t r_t, f_t k_t
    alignas(64) Tokens r, k, d, log_d;    // backward, as are the following
    alignas(64) Tokens dy, dr, dk, dv;    // dr, dk: R_t / e_t and K_t / f_t
    alignas(64) float D[GROUPS * N];      // D(1..GROUP)
    alignas(64) float GS[GROUPS * N];     // sum_i G S
    alignas(64) float A[GROUPS * SLOTS];  // by pair(s, t)
    alignas(64) float c[GROUPS * SLOTS];
    alignas(64) float S[N * N], G[N * N], kept[GROUPS * ROWS * MAX_VECS * W];
    alignas(64) float log_now[N], d_now[N];  // WKV-5.2: the decay
    alignas(64) float du[N], dw[N], one[N];  // sums over tokens
};

// ---------------------------------------------------------------- small sums

// Row by row sums of SLOTS registers.
INLINE void store_sums(float* to, vec* part) {
    for (int i = 0; i < SLOTS; i += W) store(to + i, row_sums(part + i));
}

// Fill m for tokens first .. first + n - 1 of a run with what needs only keys; tokens after them change nothing.
template <int N, bool BACKWARD, typename T, bool PER_TOKEN>
INLINE void open_keys(Interval<N>& m, const Inputs<T, PER_TOKEN>& x, const Run& run, int64_t first, int n) {
    for (int g = 0; g * GROUP < n; ++g) {
        vec part[SLOTS] = {};
        for (int j = 0; j < N; j += W) {
            vec r[GROUP], k[GROUP], d[GROUP], log_all = splat(0);
            for (int t = 0; t < GROUP; ++t) {
                const int token = g * GROUP + t, to = token * N + j;
                const int64_t at = run.first + (first + token) * run.stride + j;
                const bool real = token < n;
                r[t] = real ? load(x.r + at) : splat(0);
                k[t] = real ? load(x.k + at) : splat(0);
                vec log_d = splat(0);
                d[t] = splat(1);
                if constexpr (PER_TOKEN) {
                    if (real) {
                        log_d = -exp(load(x.w + at));
                        d[t] = exp_decay(log_d);
                    }
                } else if (real) {
                    log_d = load(m.log_now + j);
                    d[t] = load(m.d_now + j);
                }
                log_all += log_d;
                if constexpr (BACKWARD) {
                    store(m.r + to, r[t]), store(m.k + to, k[t]), store(m.d + to, d[t]), store(m.log_d + to, log_d);
                }
            }
            const vec u = load(x.u + run.shared + j);
            for (int t = 0; t < GROUP; ++t) {
                vec carry = r[t];
                part[pair(t, t)] += carry * u * k[t];
                for (int s = t - 1; s >= 0; --s) {
                    part[pair(s, t)] += carry * k[s];
                    carry *= d[s];
                }
                store(m.er + (g * GROUP + t) * N + j, flushed(carry));
                carry = k[t];
                for (int later = t + 1; later < GROUP; ++later) carry *= d[later];
                store(m.kf + (g * GROUP + t) * N + j, flushed(carry));
            }
            store(m.D + g * N + j, exp_decay(log_all));  // one rounding for GROUP decays
        }
        store_sums(m.A + g * SLOTS, part);
    }
}

// As open_keys, with values [value, value + width): v, and `out` (y, or dv with dy at hand) without what S or G adds.
template <int N, bool BACKWARD, typename T>
INLINE void open_values(Interval<N>& m, const T* v, const T* dy, const Run& run, int64_t first, int n, int value,
                        int width, float* out) {
    for (int g = 0; g * GROUP < n; ++g) {
        vec part[SLOTS] = {};
        const float* A = m.A + g * SLOTS;
        for (int i = 0; i < width; i += W) {
            vec from[GROUP], grad[GROUP];
            for (int t = 0; t < GROUP; ++t) {
                const int token = g * GROUP + t, to = token * N + i;
                const int64_t at = run.first + (first + token) * run.stride + value + i;
                from[t] = token < n ? load(v + at) : splat(0);
                store(m.v + to, from[t]);
                if constexpr (BACKWARD) {
                    grad[t] = token < n ? load(dy + at) : splat(0);
                    store(m.dy + to, grad[t]);
                }
            }
            for (int t = 0; t < GROUP; ++t) {
                vec sum = splat(0);
                if constexpr (BACKWARD) {
                    for (int s = 0; s <= t; ++s) part[pair(s, t)] += from[s] * grad[t];
                    for (int later = t; later < GROUP; ++later) sum += A[pair(t, later)] * grad[later];
                } else {
                    for (int s = 0; s <= t; ++s) sum += A[pair(s, t)] * from[s];
                }
                store(out + (g * GROUP + t) * N + i, sum);
            }
        }
        if constexpr (BACKWARD) store_sums(m.c + g * SLOTS, part);
    }
}

}  // namespace
}  // namespace rwkv
