// WKV-6 and WKV-5.2 on the CPU, forward and backward (arXiv 2404.05892; ops/wkv6.py, wkv5.py). WKV-5.2 is WKV-6
// with the same decay at every token.
//
// Letters: N head size, i value index (state rows), j key index (state columns), d decay, S state, G = dL/dS, W lanes.
//
// Tokens go in groups of GROUP. Let D(a..b) be the product of the decays of tokens a to b of a group (1 if there is
// none), S the state before the group, and for tokens s <= t of it
//     e_t = D(1..t-1),   f_s = D(s+1..GROUP),   A_st = sum_j r_t D(s+1..t-1) k_s  (s < t),   A_tt = sum_j r_t u k_t.
// Then
//     y_t = S (e_t r_t) + sum_{s<=t} A_st v_s,   S <- S diag(D(1..GROUP)) + sum_s v_s (f_s k_s)^T.
// With G = dL/dS after the group and c_st = v_s . dy_t, backward is
//     R_t = e_t (S^T dy_t),   dr_t = R_t + sum_{s<t} D(s+1..t-1) k_s c_st + u k_t c_tt
//     K_s = f_s (G^T v_s),    dk_s = K_s + sum_{t>s} D(s+1..t-1) r_t c_st + u r_s c_ss
//     dv_s = G (f_s k_s) + sum_{t>=s} A_st dy_t,   du = sum_t c_tt r_t k_t
//     G <- G diag(D(1..GROUP)) + sum_t dy_t (e_t r_t)^T
// and d(log d_m) is the sum over all that passes token m on its way from an earlier token to a later one:
//     D(1..GROUP) sum_i G S + sum_{s<m} k_s K_s + sum_{t>m} r_t R_t + sum_{s<m<t} D(s+1..t-1) k_s r_t c_st.
// Nothing is divided by a decay and nothing subtracted, so any decay is exact, 0 too, and a token of r = k = v = 0 and
// d = 1 changes nothing, which fills the last group. Per token and state element this is 2 + 1/GROUP fused
// multiply-adds forward and 5 + 3/GROUP backward, where the token by token form has 3 and 8 (7 with a
// running difference for d(log d), which rounds off what strong decays leave).
//
// A sweep keeps a tile of S or G in registers over all groups of an interval. Forward has S by [key][value], so that
// its sums over keys are plain vector sums; backward has S and G by [value][key], where only dv's sums are within
// registers.
#pragma once

#include "wkv56_groups.h"

namespace rwkv {
namespace {

// ---------------------------------------------------------------- sweeps

typedef float rows_vec __attribute__((vector_size(ROWS * 4)));  // one number for each row of a tile

INLINE rows_vec load_rows(const float* p) {
    rows_vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

INLINE void store_rows(float* p, rows_vec x) { std::memcpy(p, &x, sizeof(x)); }

template <int VECS>
using Tile = vec[ROWS][VECS];

template <int VECS>
INLINE void load_tile(Tile<VECS>& tile, const float* from, int stride) {
    for (int i = 0; i < ROWS; ++i)
        for (int u = 0; u < VECS; ++u) tile[i][u] = load(from + i * stride + u * W);
}

template <int VECS>
INLINE void store_tile(const Tile<VECS>& tile, float* to, int stride) {
    for (int i = 0; i < ROWS; ++i)
        for (int u = 0; u < VECS; ++u) store(to + i * stride + u * W, tile[i][u]);
}

// Take a tile of S through n tokens: out_t += sum over rows of S a_t[row], then S <- S D + sum_t b_t[row] x_t.
// Rows are keys (then D is by row) or values (then D is by column). The tile before each group goes to `kept`.
template <int N, int VECS, bool KEY_ROWS>
INLINE void sweep(float* S, int stride, int n, const float* a, const float* b, const float* x, float* out,
                  const float* D, float* kept) {
    Tile<VECS> s;
    load_tile<VECS>(s, S, stride);
    for (int t = 0; t < n; t += GROUP, D += N) {
        if (!KEY_ROWS) {
            store_tile<VECS>(s, kept, VECS * W);
            kept += ROWS * VECS * W;
        }
        for (int q = 0; q < GROUP; ++q, a += N, out += N) {
            vec sum[VECS];
            for (int u = 0; u < VECS; ++u) sum[u] = load(out + u * W);
            for (int i = 0; i < ROWS; ++i)
                for (int u = 0; u < VECS; ++u) sum[u] += s[i][u] * a[i];
            for (int u = 0; u < VECS; ++u) store(out + u * W, sum[u]);
        }
        for (int i = 0; i < ROWS; ++i)
            for (int u = 0; u < VECS; ++u) s[i][u] *= KEY_ROWS ? splat(D[i]) : load(D + u * W);
        for (int q = 0; q < GROUP; ++q, b += N, x += N)
            for (int u = 0; u < VECS; ++u) {
                const vec now = load(x + u * W);
                for (int i = 0; i < ROWS; ++i) s[i][u] += b[i] * now;
            }
    }
    store_tile<VECS>(s, S, stride);
}

// Take the tile of G at (row, column) back through n tokens, with the tiles of S that `sweep` kept.
template <int N, int VECS>
INLINE void sweep_back(Interval<N>& m, int row, int column, int n) {
    Tile<VECS> G;
    load_tile<VECS>(G, m.G + row * N + column, N);
    for (int g = (n - 1) / GROUP; g >= 0; --g) {
        const float* S = m.kept + g * ROWS * VECS * W;
        float* GS = m.GS + g * N + column;
        for (int u = 0; u < VECS; ++u) {
            vec sum = load(GS + u * W);
            for (int i = 0; i < ROWS; ++i) sum += G[i][u] * load(S + (i * VECS + u) * W);
            store(GS + u * W, sum);
        }
        vec dv[GROUP * ROWS];
        for (int q = 0; q < GROUP; ++q) {
            const int t = g * GROUP + q;
            vec dk[VECS], kf[VECS];
            for (int u = 0; u < VECS; ++u) {
                dk[u] = load(m.dk + t * N + column + u * W);
                kf[u] = load(m.kf + t * N + column + u * W);
            }
            for (int i = 0; i < ROWS; ++i) {
                const vec v = splat(m.v[t * N + row + i]);
                dv[q * ROWS + i] = G[i][0] * kf[0];
                for (int u = 1; u < VECS; ++u) dv[q * ROWS + i] += G[i][u] * kf[u];
                for (int u = 0; u < VECS; ++u) dk[u] += G[i][u] * v;
            }
            for (int u = 0; u < VECS; ++u) store(m.dk + t * N + column + u * W, dk[u]);
        }
        alignas(64) float sums[GROUP * ROWS];
        for (int i = 0; i < GROUP * ROWS; i += W) store(sums + i, row_sums(dv + i));
        for (int q = 0; q < GROUP; ++q) {
            float* to = m.dv + (g * GROUP + q) * N + row;
            store_rows(to, load_rows(to) + load_rows(sums + q * ROWS));
        }
        for (int u = 0; u < VECS; ++u) {
            const vec D = load(m.D + g * N + column + u * W);
            for (int i = 0; i < ROWS; ++i) G[i][u] *= D;
        }
        for (int q = 0; q < GROUP; ++q)
            for (int u = 0; u < VECS; ++u) {
                const vec er = load(m.er + (g * GROUP + q) * N + column + u * W);
                for (int i = 0; i < ROWS; ++i) G[i][u] += m.dy[(g * GROUP + q) * N + row + i] * er;
            }
    }
    store_tile<VECS>(G, m.G + row * N + column, N);
}

// ---------------------------------------------------------------- runs

// Ask for the tokens of an interval that comes next, one of N / ROWS shares of them: a token's N elements lie far from
// the next token's, which no hardware foresees.
template <int N, typename T, size_t COUNT>
INLINE void fetch(const std::array<const T*, COUNT>& inputs, const Run& run, int64_t first, int share) {
    constexpr int TOKENS = (INTERVAL * ROWS + N - 1) / N;
    const int64_t end = std::min(first + std::min((share + 1) * TOKENS, INTERVAL), run.tokens);
    for (int64_t t = std::max<int64_t>(first, 0) + share * TOKENS; first >= 0 && t < end; ++t)
        for (const T* x : inputs) prefetch(x + run.first + t * run.stride, N);
}

template <int N, typename T, bool PER_TOKEN>
INLINE void open_run(Interval<N>& m, const Inputs<T, PER_TOKEN>& x, const Run& run) {
    if constexpr (!PER_TOKEN)
        for (int j = 0; j < N; j += W) {
            const vec log_d = -exp(load(x.w + run.shared + j));
            store(m.log_now + j, log_d);
            store(m.d_now + j, exp_decay(log_d));
        }
}

// One run, for the values [value, value + width) of its head. checkpoints may be null (nothing is kept then).
template <int N, int VECS, typename T, bool PER_TOKEN>
void forward_run(Interval<N>& m, const Inputs<T, PER_TOKEN>& x, const Run& run, int value, int width,
                 const float* state, T* y, float* state_out, float* checkpoints) {
    open_run(m, x, run);
    transpose(state + run.state + value * N, N, m.S, width, width, N);
    float* out = m.dv;
    for (int64_t first = 0; first < run.tokens; first += INTERVAL) {
        if (checkpoints)
            for (int j = 0; j < N; ++j)
                std::memcpy(checkpoints + run.checkpoint + first / INTERVAL * run.interval + j * N + value,
                            m.S + j * width, width * sizeof(float));
        const int n = std::min<int64_t>(INTERVAL, run.tokens - first);
        open_keys<N, false>(m, x, run, first, n);
        open_values<N, false, T>(m, x.v, nullptr, run, first, n, value, width, out);
        for (int i = 0; i < width; i += VECS * W)
            for (int j = 0; j < N; j += ROWS) {
                if (i == 0) fetch<N>(x.tokens(), run, first + INTERVAL, j / ROWS);
                sweep<N, VECS, true>(m.S + j * width + i, width, n, m.er + j, m.kf + j, m.v + i, out + i, m.D + j,
                                     nullptr);
            }
        for (int t = 0; t < n; ++t)
            for (int i = 0; i < width; i += W)
                store(y + run.first + (first + t) * run.stride + value + i, load(out + t * N + i));
    }
    transpose(m.S, width, state_out + run.state + value * N, N, N, width);
}

template <typename T, bool PER_TOKEN>
struct Grads {
    T *r, *k, *v;
    std::conditional_t<PER_TOKEN, T*, float*> w;  // WKV-5.2: a partial sum for each row
    float* u;                                     // a partial sum for each row
};

// Write the gradients of tokens first .. first + n - 1, of which G and S have given their shares.
template <int N, typename T, bool PER_TOKEN>
INLINE void close_interval(Interval<N>& m, const Inputs<T, PER_TOKEN>& x, const Run& run, int64_t first, int n,
                           const Grads<T, PER_TOKEN>& out) {
    for (int j = 0; j < N; j += W) {
        const vec u = load(x.u + run.shared + j);
        vec du = splat(0), dw = splat(0);
        for (int g = 0; g * GROUP < n; ++g) {
            vec r[GROUP], k[GROUP], d[GROUP], dr[GROUP], dk[GROUP], log_grad[GROUP];
            const float* c = m.c + g * SLOTS;
            for (int t = 0; t < GROUP; ++t) {
                const int from = (g * GROUP + t) * N + j;
                r[t] = load(m.r + from), k[t] = load(m.k + from), d[t] = load(m.d + from);
                dr[t] = load(m.dr + from), dk[t] = load(m.dk + from);
                log_grad[t] = load(m.GS + g * N + j) * load(m.D + g * N + j);
            }
            for (int t = 0; t < GROUP; ++t) {
                for (int s = 0; s < t; ++s) dr[t] *= d[s];
                for (int later = t + 1; later < GROUP; ++later) dk[t] *= d[later];
                const vec before = r[t] * dr[t], after = k[t] * dk[t];
                for (int s = 0; s < t; ++s) log_grad[s] += before;
                for (int later = t + 1; later < GROUP; ++later) log_grad[later] += after;
            }
            for (int t = 0; t < GROUP; ++t) {
                dr[t] += c[pair(t, t)] * u * k[t];
                dk[t] += c[pair(t, t)] * u * r[t];
                du += c[pair(t, t)] * r[t] * k[t];
                vec between = splat(1);  // D(s+1..t-1)
                for (int s = t - 1; s >= 0; --s) {
                    const vec weight = between * c[pair(s, t)], to_k = weight * r[t];
                    dr[t] += weight * k[s];
                    dk[s] += to_k;
                    for (int passed = s + 1; passed < t; ++passed) log_grad[passed] += to_k * k[s];
                    between *= d[s];
                }
            }
            for (int t = 0; t < std::min(GROUP, n - g * GROUP); ++t) {
                const int64_t at = run.first + (first + g * GROUP + t) * run.stride + j;
                store(out.r + at, dr[t]), store(out.k + at, dk[t]);
                store(out.v + at, load(m.dv + (g * GROUP + t) * N + j));
                if constexpr (PER_TOKEN)
                    store(out.w + at, log_grad[t] * load(m.log_d + (g * GROUP + t) * N + j));
                else
                    dw += log_grad[t];
            }
        }
        store(m.du + j, load(m.du + j) + du);
        store(m.dw + j, load(m.dw + j) + dw);
    }
}

template <int N, typename T, bool PER_TOKEN>
void backward_run(Interval<N>& m, const Inputs<T, PER_TOKEN>& x, const Run& run, const float* checkpoints, const T* dy,
                  const float* dstate_out, const Grads<T, PER_TOKEN>& out, float* dstate) {
    constexpr int VECS = std::min(MAX_VECS, N / W);
    open_run(m, x, run);
    std::memcpy(m.G, dstate_out + run.state, sizeof(m.G));
    std::memset(m.du, 0, sizeof(m.du));
    std::memset(m.dw, 0, sizeof(m.dw));
    for (int64_t first = (run.tokens - 1) / INTERVAL * INTERVAL; run.tokens && first >= 0; first -= INTERVAL) {
        const int n = std::min<int64_t>(INTERVAL, run.tokens - first);
        open_keys<N, true>(m, x, run, first, n);
        open_values<N, true>(m, x.v, dy, run, first, n, 0, N, m.dv);
        for (float* p : {m.dr, m.dk}) std::memset(p, 0, (n + GROUP - 1) / GROUP * GROUP * N * sizeof(float));
        std::memset(m.GS, 0, sizeof(m.GS));
        transpose(checkpoints + run.checkpoint + first / INTERVAL * run.interval, N, m.S, N, N, N);
        for (int i = 0; i < N; i += ROWS) {
            fetch<N>(x.tokens(), run, first - INTERVAL, i / ROWS);
            fetch<N>(std::array{dy}, run, first - INTERVAL, i / ROWS);
            for (int j = 0; j < N; j += VECS * W) {
                sweep<N, VECS, false>(m.S + i * N + j, N, n, m.dy + i, m.v + i, m.kf + j, m.dr + j, m.D + j, m.kept);
                sweep_back<N, VECS>(m, i, j, n);
            }
        }
        close_interval(m, x, run, first, n, out);
    }
    std::memcpy(dstate + run.state, m.G, sizeof(m.G));
    for (int j = 0; j < N; j += W) {
        store(out.u + run.element + j, load(m.du + j));
        if constexpr (!PER_TOKEN) store(out.w + run.element + j, load(m.dw + j) * load(m.log_now + j));
    }
}

// ---------------------------------------------------------------- calls

// The pointers of a call's five inputs, which come first.
template <typename T, bool PER_TOKEN>
Inputs<T, PER_TOKEN> inputs_of(void* const* x) {
    return {tensor<const T>(x, 0), tensor<const T>(x, 1), tensor<const T>(x, 2),
            tensor<std::conditional_t<PER_TOKEN, const T, const float>>(x, 3), tensor<const float>(x, 4)};
}

// r, k, v, w, u, state, places | y, final state | state before each interval (intervals, H, N_key, N_value)
template <bool PER_TOKEN>
const char* forward56(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    return dispatch(sizes, dtype, [&](auto size, auto element) {
        constexpr int N = decltype(size)::value;
        using T = decltype(element);
        enum { STATE = 5, PLACES, Y, LAST, CHECKPOINTS };
        const Rows rows(x[PLACES], sizes, N, N);
        const int width = values_of_a_task<N>(rows.tasks, threads), parts = N / width;
        for_tasks<Interval<N>>(threads, rows.tasks * parts, [&](int64_t task, Interval<N>& m) {
            const auto with = [&](auto vecs) {
                forward_run<N, decltype(vecs)::value, T>(
                    m, inputs_of<T, PER_TOKEN>(x), rows.run(task / parts), task % parts * width, width,
                    tensor<float>(x, STATE), tensor<T>(x, Y), tensor<float>(x, LAST), tensor<float>(x, CHECKPOINTS));
            };
            if (width >= 4 * W && MAX_VECS >= 4)
                with(Constant<std::min(MAX_VECS, N / W)>{});
            else if (width >= 2 * W)
                with(Constant<2>{});
            else
                with(Constant<1>{});
        });
    });
}

// r, k, v, w, u, state before each interval, places, dy, gradient of the final state | dr, dk, dv, dw, du, gradient of
// the initial state
template <bool PER_TOKEN>
const char* backward56(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    return dispatch(sizes, dtype, [&](auto size, auto element) {
        constexpr int N = decltype(size)::value;
        using T = decltype(element);
        enum { CHECKPOINTS = 5, PLACES, DY, DLAST, DR, DK, DV, DW, DU, DSTATE };
        const Rows rows(x[PLACES], sizes, N, N);
        std::vector<float> du(sizes.rows * rows.width), dw(PER_TOKEN ? 0 : du.size());
        Grads<T, PER_TOKEN> out{tensor<T>(x, DR), tensor<T>(x, DK), tensor<T>(x, DV), nullptr, du.data()};
        if constexpr (PER_TOKEN)
            out.w = tensor<T>(x, DW);
        else
            out.w = dw.data();
        for_tasks<Interval<N>>(threads, rows.tasks, [&](int64_t task, Interval<N>& m) {
            backward_run<N, T, PER_TOKEN>(m, inputs_of<T, PER_TOKEN>(x), rows.run(task), tensor<float>(x, CHECKPOINTS),
                                          tensor<T>(x, DY), tensor<float>(x, DLAST), out, tensor<float>(x, DSTATE));
        });
        sum_rows(du, rows.width, tensor<float>(x, DU));
        if constexpr (!PER_TOKEN) sum_rows(dw, rows.width, tensor<float>(x, DW));
    });
}

}  // namespace
}  // namespace rwkv
