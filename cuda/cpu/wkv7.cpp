// WKV-7 on the CPU, forward and backward (recurrence and gradients: RWKV-7 "Goose", arXiv 2503.14456; ops/wkv7.py).
//
// Letters: N head size, i value index (state rows), j key index (state columns), d decay, S state, G = dL/dS.
//
// Decay without multiplying the state: inside a block of BLOCK tokens let P_t = d_1 * ... * d_t (per key). With
//     S~ = S / P,   r~_t = P_t r_t,   k~_t = k_t / P_t,   b~_t = b_t / P_t,   a~_t = P_{t-1} a_t
// the recurrence has no decay: S~_t = S~_{t-1} + sa_t b~_t^T + v_t k~_t^T, sa_t = S~_{t-1} a~_t, y_t = S~_t r~_t. Nor
// has the gradient G^ = G * P. An old entry is small against a new one by the same factor as before, so rounding is
// that of the plain form; 1 / P <= 0.5452^-16 = 16400. It is no back-stepping: states only run forwards, from
// checkpoints.
//
// Forward keeps S by [key][value], so its sums over keys are plain vector sums. Backward keeps S, G by [value][key]:
// five of its seven sums are over values, and rows need nothing of each other, so it works through RV rows at a time
// and the states of a whole checkpoint interval fit the second-level cache.
#include "wkv7_inputs.h"

namespace rwkv {
namespace {

// ---------------------------------------------------------------- forward

// One token for VB * W values: updates S [key][value], returns y and sa of the next token.
template <int N, int VB>
INLINE void forward_sweep(float* S, int width, const float* r, const float* k, const float* b, const float* a_next,
                          const vec* v, vec* sa, vec* y) {
    constexpr int LANES = VB >= 4 ? 1 : 4 / VB;  // partial sums enough to hide the latency of an addition
    vec y_part[LANES][VB] = {}, sa_part[LANES][VB] = {};
    for (int j = 0; j < N; j += LANES) {
#pragma GCC unroll 4
        for (int lane = 0; lane < LANES; ++lane) {
            const vec rj = splat(r[j + lane]), kj = splat(k[j + lane]);
            const vec bj = splat(b[j + lane]), aj = splat(a_next[j + lane]);
#pragma GCC unroll 4
            for (int u = 0; u < VB; ++u) {
                float* at = S + (j + lane) * width + u * W;
                const vec s = load(at) + sa[u] * bj + v[u] * kj;
                store(at, s);
                y_part[lane][u] += s * rj;
                sa_part[lane][u] += s * aj;
            }
        }
    }
    for (int u = 0; u < VB; ++u) {
        y[u] = y_part[0][u];
        sa[u] = sa_part[0][u];
        for (int lane = 1; lane < LANES; ++lane) {
            y[u] += y_part[lane][u];
            sa[u] += sa_part[lane][u];
        }
    }
}

// Rows of floats, `stride` apart.
template <typename T>
struct Strided {
    T* p;
    int64_t stride;
};

// n tokens for VB * W values: updates S and sa, fills y. v, y and, unless it is null, sa_out: [token][values]. Apart
// from `forward_run`, so that it is compiled once for both dtypes.
template <int N, int VB>
[[gnu::noinline]] void forward_block(float* S, int width, int n, const Prepared<N>& x, Strided<const float> v,
                                     float* sa_now, Strided<float> y, Strided<float> sa_out) {
    vec sa[VB], v_now[VB], out[VB];
    for (int u = 0; u < VB; ++u) sa[u] = load(sa_now + u * W);
    for (int t = 0; t < n; ++t) {
        for (int u = 0; u < VB; ++u) v_now[u] = load(v.p + t * v.stride + u * W);
        if (sa_out.p)
            for (int u = 0; u < VB; ++u) store(sa_out.p + t * sa_out.stride + u * W, sa[u]);
        forward_sweep<N, VB>(S, width, x.r + t * N, x.k + t * N, x.b + t * N, x.a_next + t * N, v_now, sa, out);
        for (int u = 0; u < VB; ++u) store(y.p + t * y.stride + u * W, out[u]);
    }
    for (int u = 0; u < VB; ++u) store(sa_now + u * W, sa[u]);
}

// One run, for the values [value, value + width) of its head. sa and checkpoints may be null (nothing is kept then).
template <int N, int VB, typename T>
void forward_run(const Inputs<T>& x, const Run& run, int value, int width, const float* state, T* y, float* state_out,
                 float* sa_out, float* checkpoints) {
    alignas(64) float S[N * N], r[BLOCK * N], k[BLOCK * N], b[BLOCK * N], a_next[BLOCK * N], P[N], sa_now[N] = {};
    alignas(64) float v[BLOCK * N], out[BLOCK * N];
    transpose(state + run.state + value * N, N, S, width, width, N);
    if (run.tokens > 0)
        for (int j = 0; j < N; j += W) {
            alignas(64) float a[W];
            store(a, load(x.a + run.first + j));
            for (int lane = 0; lane < W; ++lane)
                for (int i = 0; i < width; i += W)
                    store(sa_now + i, load(sa_now + i) + a[lane] * load(S + (j + lane) * width + i));
        }
    const Prepared<N> block{r, k, b, a_next, nullptr, nullptr, nullptr};
    for (int64_t first = 0; first < run.tokens; first += BLOCK) {
        if (checkpoints && first % INTERVAL == 0)
            for (int j = 0; j < N; ++j)
                std::memcpy(checkpoints + run.checkpoint + first / INTERVAL * run.interval + j * N + value,
                            S + j * width, width * sizeof(float));
        const int n = std::min<int64_t>(BLOCK, run.tokens - first);
        prepare<N, false>(x, run, first, n, block, P);
        const int64_t here = run.first + first * run.stride + value;
        Strided<const float> values{v, width};
        Strided<float> results{out, width}, kept{sa_out ? sa_out + here : nullptr, run.stride};
        if constexpr (std::is_same_v<T, float>) {
            values = {x.v + here, run.stride}, results = {y + here, run.stride};
        } else {
            for (int t = 0; t < n; ++t)
                for (int i = 0; i < width; i += W) store(v + t * width + i, load(x.v + here + t * run.stride + i));
        }
        for (int i = 0; i < width; i += VB * W)
            forward_block<N, VB>(S + i, width, n, block, {values.p + i, values.stride}, sa_now + i,
                                 {results.p + i, results.stride}, {kept.p ? kept.p + i : nullptr, kept.stride});
        if constexpr (!std::is_same_v<T, float>)
            for (int t = 0; t < n; ++t)
                for (int i = 0; i < width; i += W) store(y + here + t * run.stride + i, load(out + t * width + i));
        for (int j = 0; j < N; ++j)
            for (int i = 0; i < width; i += W) store(S + j * width + i, load(S + j * width + i) * P[j]);
    }
    transpose(S, width, state_out + run.state + value * N, N, N, width);
}

// ---------------------------------------------------------------- backward

// Everything one thread needs for one interval of one run. Index t counts from 1; 0 is the state before the interval.
template <int N>
struct Interval {
    static constexpr int ROWS = INTERVAL + 2;
    alignas(64) float r[ROWS * N], k[ROWS * N], b[ROWS * N], a_next[ROWS * N];  // rescaled; [0] zero but for a_next
    alignas(64) float P[ROWS * N], inverse[ROWS * N], slope[ROWS * N];
    alignas(64) float v[ROWS * N], dy[ROWS * N], sa[ROWS * N], dv[ROWS * N];                    // [0] zero
    alignas(64) float dr[ROWS * N], dk[ROWS * N], db[ROWS * N], da[ROWS * N], decay[ROWS * N];  // sums over values
    alignas(64) float S[(INTERVAL / 2 + 1) * RV * N];  // [slot][RV][N]; slot 0: t = 0, slot s: t = 2 s - 1
    alignas(64) float G[N * N], S0[N * N], dsa[RV];
};

// The states after tokens 1, 3, 5 .. n of RV value rows, from that in slot 0. Half of them, because writing all would
// take longer than the sweep needs to make one from the other (forwards, and within a block as t is even).
template <int N>
[[gnu::noinline]] void recompute_states(Interval<N>& m, int row, int n) {
    constexpr int KEYS = N / W < 4 ? N / W : 4, GROUP = W == 16 ? 4 : 2;
    for (int i = 0; i < RV; i += GROUP)
        for (int j = 0; j < N; j += KEYS * W) {
            vec s[GROUP][KEYS];
            for (int g = 0; g < GROUP; ++g)
                for (int u = 0; u < KEYS; ++u) s[g][u] = load(m.S + (i + g) * N + j + u * W);
            for (int t = 1; t <= n; ++t) {
                if (t > 1 && t % BLOCK == 1)
                    for (int u = 0; u < KEYS; ++u) {
                        const vec P = load(m.P + (t - 1) * N + j + u * W);
                        for (int g = 0; g < GROUP; ++g) s[g][u] *= P;
                    }
                const float *k = m.k + t * N + j, *b = m.b + t * N + j;
                const float *v = m.v + t * N + row + i, *sa = m.sa + t * N + row + i;
                float* to = m.S + ((t + 1) / 2 * RV + i) * N + j;
#pragma GCC unroll 4
                for (int g = 0; g < GROUP; ++g)
#pragma GCC unroll 4
                    for (int u = 0; u < KEYS; ++u) {
                        s[g][u] += sa[g] * load(b + u * W);  // two statements: two fused multiply-adds
                        s[g][u] += v[g] * load(k + u * W);
                        if (t % 2) store(to + g * N + u * W, s[g][u]);
                    }
            }
        }
}

// Token t of RV value rows, with S_t at hand (STEP: made from that of token t - 1): first what token t + 1 needs of S_t
// (decay, a, and its share of G), then token t.
template <int N, bool STEP>
[[gnu::noinline]] void backward_sweep(Interval<N>& m, int row, int t) {
    const int here = t * N, next = (t + 1) * N;
    const float* S = m.S + (t + !STEP) / 2 * RV * N;
    const float *dy = m.dy + here + row, *v = m.v + here + row, *sa = m.sa + here + row;
    float* G = m.G + row * N;
    vec dv_part[RV], dsa_part[RV];
#pragma GCC unroll 8
    for (int j = 0; j < N; j += KB * W) {
        vec a[KB], r[KB], k[KB], b[KB], decay[KB], da[KB], dr[KB], dk[KB], db[KB];
#pragma GCC unroll 2
        for (int u = 0; u < KB; ++u) {
            const int c = j + u * W;
            a[u] = load(m.a_next + here + c), r[u] = load(m.r + here + c);
            k[u] = load(m.k + here + c), b[u] = load(m.b + here + c);
            decay[u] = load(m.decay + next + c), da[u] = load(m.da + next + c);
            dr[u] = load(m.dr + here + c), dk[u] = load(m.dk + here + c), db[u] = load(m.db + here + c);
        }
        for (int tile = 0; tile < RV; tile += W) {
            for (int i = tile; i < tile + W; ++i) {
                const vec dsa_i = splat(m.dsa[i]), dy_i = splat(dy[i]), v_i = splat(v[i]), sa_i = splat(sa[i]);
                vec dv_i, dsa_new;
#pragma GCC unroll 2
                for (int u = 0; u < KB; ++u) {
                    const int c = i * N + j + u * W;
                    vec s = load(S + c);
                    if constexpr (STEP) {
                        s += sa_i * b[u];
                        s += v_i * k[u];
                    }
                    vec g = load(G + c);
                    decay[u] += g * s;
                    da[u] += s * dsa_i;
                    dr[u] += s * dy_i;
                    g += dsa_i * a[u];
                    g += dy_i * r[u];
                    store(G + c, g);
                    dk[u] += g * v_i;
                    db[u] += g * sa_i;
                    dv_i = u ? dv_i + g * k[u] : g * k[u];
                    dsa_new = u ? dsa_new + g * b[u] : g * b[u];
                }
                dv_part[i] = j ? dv_part[i] + dv_i : dv_i;
                dsa_part[i] = j ? dsa_part[i] + dsa_new : dsa_new;
            }
            if (j + KB * W == N) {
                store(m.dv + here + row + tile, row_sums(dv_part + tile));
                store(m.dsa + tile, row_sums(dsa_part + tile));
            }
        }
#pragma GCC unroll 2
        for (int u = 0; u < KB; ++u) {
            const int c = j + u * W;
            store(m.decay + next + c, decay[u]), store(m.da + next + c, da[u]);
            store(m.dr + here + c, dr[u]), store(m.dk + here + c, dk[u]), store(m.db + here + c, db[u]);
        }
    }
}

// Load and rescale tokens first + 1 .. first + n of the run (counted from 1) and clear the sums.
template <int N, typename T>
void open_interval(Interval<N>& m, const Inputs<T>& x, const Run& run, int64_t first, int n, const T* dy,
                   const float* sa) {
    alignas(64) float P_end[N];
    for (float* p : {m.r, m.k, m.b, m.v, m.dy, m.sa}) std::memset(p, 0, N * sizeof(float));
    for (float* p : {m.dr, m.dk, m.db, m.da, m.decay}) std::memset(p, 0, (n + 2) * N * sizeof(float));
    for (int j = 0; j < N; j += W) {
        store(m.P + j, splat(1.f));
        store(m.a_next + j, load(x.a + run.first + first * run.stride + j));
    }
    for (int t = 0; t < n; t += BLOCK) {
        const int to = (t + 1) * N;
        const Prepared<N> block{m.r + to, m.k + to, m.b + to, m.a_next + to, m.P + to, m.inverse + to, m.slope + to};
        prepare<N, true>(x, run, first + t, std::min(BLOCK, n - t), block, P_end);
    }
    std::memset(m.a_next + n * N, 0, N * sizeof(float));  // the next interval has seen to its first token itself
    for (int t = 1; t <= n; ++t)
        for (int i = 0; i < N; i += W) {
            const int64_t at = run.first + (first + t - 1) * run.stride + i;
            __builtin_prefetch(dy + at - INTERVAL * run.stride);
            __builtin_prefetch(sa + at - INTERVAL * run.stride);
            store(m.v + t * N + i, load(x.v + at));
            store(m.dy + t * N + i, load(dy + at));
            store(m.sa + t * N + i, load(sa + at));
        }
}

// Undo the rescaling and write the gradients of tokens first + 1 .. first + n.
template <int N, typename T>
void close_interval(const Interval<N>& m, const Run& run, int64_t first, int n, const std::array<T*, 6>& out) {
    for (int t = 1; t <= n; ++t)
        for (int j = 0; j < N; j += W) {
            const int64_t at = run.first + (first + t - 1) * run.stride + j;
            const int c = t * N + j;
            // a~ of a block's first token is in the scale of the block before it, whose last P is P[t - 1] as well
            const vec inverse = load(m.inverse + c);
            store(out[0] + at, load(m.dr + c) * load(m.P + c));
            store(out[1] + at, load(m.decay + c) * load(m.slope + c));
            store(out[2] + at, load(m.dk + c) * inverse);
            store(out[3] + at, load(m.dv + c));
            store(out[4] + at, load(m.da + c) * load(m.P + c - N));
            store(out[5] + at, load(m.db + c) * inverse);
        }
}

template <int N, typename T>
void backward_run(Interval<N>& m, const Inputs<T>& x, const Run& run, const float* sa, const float* checkpoints,
                  const T* dy, const float* dstate_out, const std::array<T*, 6>& out, float* dstate) {
    std::memcpy(m.G, dstate_out + run.state, sizeof(m.G));
    for (int64_t first = (run.tokens - 1) / INTERVAL * INTERVAL; run.tokens && first >= 0; first -= INTERVAL) {
        const int n = std::min<int64_t>(INTERVAL, run.tokens - first);
        open_interval<N>(m, x, run, first, n, dy, sa);
        transpose(checkpoints + run.checkpoint + first / INTERVAL * run.interval, N, m.S0, N, N, N);
        for (int row = 0; row < N; row += RV) {
            std::memcpy(m.S, m.S0 + row * N, RV * N * sizeof(float));
            std::memset(m.dsa, 0, sizeof(m.dsa));
            recompute_states<N>(m, row, n);
            for (int t = n; t >= 0; --t) {
                if (t > 0 && (t == n || t % BLOCK == 0))  // G enters this block's scale
                    for (int i = row; i < row + RV; ++i)
                        for (int j = 0; j < N; j += W)
                            store(m.G + i * N + j, load(m.G + i * N + j) * load(m.P + t * N + j));
                if (t > 0 && t % 2 == 0)
                    backward_sweep<N, true>(m, row, t);
                else
                    backward_sweep<N, false>(m, row, t);
            }
        }
        close_interval<N>(m, run, first, n, out);
    }
    std::memcpy(dstate + run.state, m.G, sizeof(m.G));
}

// ---------------------------------------------------------------- calls

// The pointers of a call's six inputs, which come first.
template <typename T>
Inputs<T> inputs_of(void* const* x) {
    const auto in = [&](int i) { return tensor<const T>(x, i); };
    return {in(0), in(1), in(2), in(3), in(4), in(5)};
}

template <int N>
Rows rows_of(const void* places, const Sizes& sizes) {
    return Rows(places, sizes, N, N);
}

}  // namespace

RWKV_PUBLIC int64_t rwkv_interval() { return INTERVAL; }

// r, w, k, v, a, b, state, places | y, final state | S before each interval (intervals, H, N_key, N_value), sa
RWKV_EXPORT rwkv_forward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    return dispatch(sizes, dtype, [&](auto size, auto element) {
        using T = decltype(element);
        enum { STATE = 6, PLACES, Y, LAST, CHECKPOINTS, SA };
        constexpr int N = decltype(size)::value;
        const Rows rows = rows_of<N>(x[PLACES], sizes);
        const int width = values_of_a_task<N>(rows.tasks, threads), parts = N / width;
        for_tasks<Nothing>(threads, rows.tasks * parts, [&](int64_t task, Nothing&) {
            const auto with = [&](auto vb) {
                forward_run<N, decltype(vb)::value, T>(
                    inputs_of<T>(x), rows.run(task / parts), task % parts * width, width, tensor<float>(x, STATE),
                    tensor<T>(x, Y), tensor<float>(x, LAST), tensor<float>(x, SA), tensor<float>(x, CHECKPOINTS));
            };
            if (width >= 4 * W && MAX_VB >= 4)
                with(Constant<std::min(4, N / W)>{});
            else if (width >= 2 * W)
                with(Constant<2>{});
            else
                with(Constant<1>{});
        });
    });
}

// r, w, k, v, a, b, S before each interval, sa, places, dy, gradient of the final state |
// dr, dw, dk, dv, da, db, gradient of the initial state
RWKV_EXPORT rwkv_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    return dispatch(sizes, dtype, [&](auto size, auto element) {
        using T = decltype(element);
        enum { CHECKPOINTS = 6, SA, PLACES, DY, DLAST, GRADS, DSTATE = GRADS + 6 };
        constexpr int N = decltype(size)::value;
        const Rows rows = rows_of<N>(x[PLACES], sizes);
        std::array<T*, 6> grads;
        for (int i = 0; i < 6; ++i) grads[i] = tensor<T>(x, GRADS + i);
        for_tasks<Interval<N>>(threads, rows.tasks, [&](int64_t task, Interval<N>& m) {
            backward_run<N, T>(m, inputs_of<T>(x), rows.run(task), tensor<float>(x, SA), tensor<float>(x, CHECKPOINTS),
                               tensor<T>(x, DY), tensor<float>(x, DLAST), grads, tensor<float>(x, DSTATE));
        });
    });
}

}  // namespace rwkv
