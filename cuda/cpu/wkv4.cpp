// WKV-4 on the CPU, forward and backward (arXiv 2305.13048, section 3.2; ops/wkv4.py).
//
// Letters: C channels, W lanes. Channels need nothing of each other: registers hold W of them, a run BLOCK.
//
// State: p = aa e^pp, q = bb e^pp. With l = log decay (d in wkv4.py), every token scales by the larger exponent,
//     top = max(pp, u + k),   old = e^(pp - top),     new = e^(u + k - top),   den = bb old + new
//     pp' = max(pp + l, k),   old' = e^(pp + l - pp'), new' = e^(k - pp'),
//     y = (aa old + v new) / den,   aa' = aa old' + v new',   bb' = bb old' + new',
// where of each two weights one is 1 and the other is an exponential of a number <= 0. A slow channel adds the same l
// to pp at token after token, whose roundings add up; `low` collects them: the exponent is pp + low.
//
// Backward needs no maximum of its own: let P_t = e^pp_t dL/dp_t and Q_t = -e^pp_t dL/dq_t, in the scale that forward
// chose. Then, with x = dy / den,
//     P_{t-1} = x old + old' P_t,   Q_{t-1} = x y old + old' Q_t
//     dv = x new + new' P_t,        dk = x new (v - y) + new' (v P_t - Q_t)
//     du = sum x new (v - y),       dl = sum old' (aa_{t-1} P_t - bb_{t-1} Q_t)
// whose weights are all <= 1, since k_s + (t - s) l <= pp_t for any earlier token s. The weights come from running
// forward again from a checkpoint.
#include "recurrence.h"

namespace rwkv {
namespace {

constexpr int BLOCK = 64;
constexpr int AHEAD = 16;  // tokens between asking for an input and using it: no hardware foresees rows C apart
static_assert(BLOCK % W == 0);

struct State {
    alignas(64) float aa[BLOCK], bb[BLOCK], pp[BLOCK], low[BLOCK];
};

// What one thread needs for an interval of a run.
struct Interval {
    State state;
    alignas(64) float u[BLOCK], log_decay[BLOCK], P[BLOCK], Q[BLOCK];
    alignas(64) float du[BLOCK], dl[BLOCK], du_all[BLOCK], dl_all[BLOCK];  // of the interval, of the run
    // per token: old / den, new / den, y, old', new', and aa, bb before it
    using Tokens = float[INTERVAL * BLOCK];
    alignas(64) Tokens old_share, new_share, y, old_next, new_next, aa, bb;
};

void load_state(State& to, const float* from, int channels) {
    for (int c = 0; c < BLOCK; ++c) {
        const bool real = c < channels;
        to.aa[c] = real ? from[3 * c] : 0;
        to.bb[c] = real ? from[3 * c + 1] : 0;
        to.pp[c] = real ? from[3 * c + 2] : 0;
        to.low[c] = 0;
    }
}

// Into three numbers each, after what `low` holds has gone into the sums.
void store_state(float* to, State& from, int channels) {
    for (int c = 0; c < channels; c += W) {
        const vec scale = exp(load(from.low + c));
        store(from.aa + c, load(from.aa + c) * scale);
        store(from.bb + c, load(from.bb + c) * scale);
        store(from.low + c, splat(0));
    }
    for (int c = 0; c < channels; ++c) {
        to[3 * c] = from.aa[c];
        to[3 * c + 1] = from.bb[c];
        to[3 * c + 2] = from.pp[c];
    }
}

INLINE vec absolute(vec x) { return bit_copy<vec>(bit_copy<uvec>(x) & 0x7fffffff); }

// One token of W channels: its weights; moves the state on.
struct Step {
    vec old, fresh, den, y, old_next, new_next;
};

INLINE Step step(Interval& m, int64_t c, vec k, vec v) {
    const vec one = splat(1), log_decay = load(m.log_decay + c);
    const vec aa = load(m.state.aa + c), bb = load(m.state.bb + c);
    const vec pp = load(m.state.pp + c), low = load(m.state.low + c);
    Step s;
    const vec gap = pp - (load(m.u + c) + k) + low, e = exp_decay(-absolute(gap));
    s.old = gap < 0 ? e : one;
    s.fresh = gap < 0 ? one : e;
    s.den = bb * s.old + s.fresh;
    s.y = (aa * s.old + s.fresh * v) / s.den;
    const vec decayed = pp + log_decay, added = decayed - pp;
    const vec slip = low + ((pp - (decayed - added)) + (log_decay - added));  // what rounding took, exactly
    const vec gap_next = decayed - k + slip, e_next = exp_decay(-absolute(gap_next));
    s.old_next = gap_next < 0 ? e_next : one;
    s.new_next = gap_next < 0 ? one : e_next;
    store(m.state.aa + c, aa * s.old_next + s.new_next * v);
    store(m.state.bb + c, bb * s.old_next + s.new_next);
    store(m.state.pp + c, gap_next < 0 ? k : decayed);
    store(m.state.low + c, gap_next < 0 ? splat(0) : slip);
    return s;
}

void open_run(Interval& m, const float* w, const float* u, const Run& run, int channels) {
    each(channels, [&](int64_t c, auto lanes) {
        store(m.u + c, load(u + run.shared + c, lanes));
        store(m.log_decay + c, -exp(load(w + run.shared + c, lanes)));
    });
}

// checkpoints may be null (nothing is kept then).
template <typename T>
void forward_run(Interval& m, const T* k, const T* v, const float* w, const float* u, const Run& run, int channels,
                 const float* state, T* y, float* state_out, float* checkpoints) {
    open_run(m, w, u, run, channels);
    load_state(m.state, state + run.state, channels);
    for (int64_t t = 0; t < run.tokens; ++t) {
        const int64_t at = run.first + t * run.stride;
        if (checkpoints && t % INTERVAL == 0)
            store_state(checkpoints + run.checkpoint + t / INTERVAL * run.interval, m.state, channels);
        if (t + AHEAD < run.tokens)
            for (const T* x : {k, v}) prefetch(x + at + AHEAD * run.stride, channels);
        each(channels, [&](int64_t c, auto lanes) {
            store(y + at + c, step(m, c, load(k + at + c, lanes), load(v + at + c, lanes)).y, lanes);
        });
    }
    store_state(state_out + run.state, m.state, channels);
}

// Run n tokens from m.state and note what backward needs of them.
template <typename T>
void recompute(Interval& m, const T* k, const T* v, const Run& run, int64_t first, int n, int channels) {
    for (int t = 0; t < n; ++t)
        each(channels, [&](int64_t c, auto lanes) {
            const int64_t at = run.first + (first + t) * run.stride + c, to = t * BLOCK + c;
            store(m.aa + to, load(m.state.aa + c)), store(m.bb + to, load(m.state.bb + c));
            const Step s = step(m, c, load(k + at, lanes), load(v + at, lanes));
            const vec share = 1.f / s.den;
            store(m.old_share + to, s.old * share), store(m.new_share + to, s.fresh * share), store(m.y + to, s.y);
            store(m.old_next + to, s.old_next), store(m.new_next + to, s.new_next);
        });
}

template <typename T>
struct Grads {
    T *k, *v;
    float *w, *u;  // partial sums for each row
};

// Take P and Q back through n tokens.
template <typename T>
void back(Interval& m, const T* k, const T* v, const T* dy, const Run& run, int64_t first, int n, int channels,
          const Grads<T>& out) {
    for (int t = n - 1; t >= 0; --t) {
        if (first + t >= INTERVAL)
            for (const T* x : {k, v, dy}) prefetch(x + run.first + (first + t - INTERVAL) * run.stride, channels);
        each(channels, [&](int64_t c, auto lanes) {
            const int64_t at = run.first + (first + t) * run.stride + c, from = t * BLOCK + c;
            const vec value = load(v + at, lanes), grad = load(dy + at, lanes);
            const vec old_next = load(m.old_next + from), new_next = load(m.new_next + from), y = load(m.y + from);
            const vec P = load(m.P + c), Q = load(m.Q + c);
            const vec own = grad * load(m.new_share + from), to_k = own * (value - y);
            store(out.v + at, own + new_next * P, lanes);
            store(out.k + at, to_k + new_next * (value * P - Q), lanes);
            store(m.du + c, load(m.du + c) + to_k);
            store(m.dl + c, load(m.dl + c) + old_next * (load(m.aa + from) * P - load(m.bb + from) * Q));
            const vec passed = grad * load(m.old_share + from);
            store(m.P + c, passed + old_next * P);
            store(m.Q + c, passed * y + old_next * Q);
        });
    }
}

// The gradient of the state is that of aa and bb: pp is a scale that could be any other.
template <typename T>
void backward_run(Interval& m, const T* k, const T* v, const float* w, const float* u, const Run& run, int channels,
                  const float* checkpoints, const T* dy, const float* dlast, const Grads<T>& out, float* dstate) {
    open_run(m, w, u, run, channels);
    load_state(m.state, dlast + run.state, channels);
    for (int c = 0; c < BLOCK; ++c) {
        m.P[c] = m.state.aa[c], m.Q[c] = -m.state.bb[c];
        m.du_all[c] = m.dl_all[c] = 0;
    }
    const float* begin = checkpoints + run.checkpoint;
    for (int64_t first = (run.tokens - 1) / INTERVAL * INTERVAL; run.tokens && first >= 0; first -= INTERVAL) {
        const int n = std::min<int64_t>(INTERVAL, run.tokens - first);
        load_state(m.state, begin + first / INTERVAL * run.interval, channels);
        recompute(m, k, v, run, first, n, channels);
        for (int c = 0; c < channels; c += W) {  // forward moved `low` into the sums here
            const vec scale = exp(load(m.state.low + c));
            store(m.P + c, load(m.P + c) * scale);
            store(m.Q + c, load(m.Q + c) * scale);
        }
        for (float* p : {m.du, m.dl}) std::memset(p, 0, sizeof(m.du));
        back(m, k, v, dy, run, first, n, channels, out);
        for (int c = 0; c < BLOCK; ++c) m.du_all[c] += m.du[c], m.dl_all[c] += m.dl[c];
    }
    for (int c = 0; c < channels; ++c) {
        out.u[run.element + c] = m.du_all[c];
        out.w[run.element + c] = m.dl_all[c] * m.log_decay[c];
        float* to = dstate + run.state + 3 * c;
        if (run.tokens == 0) {
            std::memcpy(to, dlast + run.state + 3 * c, 3 * sizeof(float));
        } else {
            to[0] = m.P[c], to[1] = -m.Q[c];
            to[2] = begin[3 * c] * to[0] + begin[3 * c + 1] * to[1];
        }
    }
}

// ---------------------------------------------------------------- calls

// Runs of up to BLOCK channels, fewer where that leaves threads without work.
Rows rows_of(const void* places, const Sizes& sizes, int threads) {
    int64_t block = BLOCK;
    while (block > W && sizes.rows * ((sizes.size + block - 1) / block) < threads) block /= 2;
    return Rows(places, sizes, block, 3);
}

// work(run, its channels, scratch) for every run.
template <typename Work>
void for_runs(const Rows& rows, int threads, const Work& work) {
    for_tasks<Interval>(threads, rows.tasks, [&](int64_t task, Interval& m) {
        const Run run = rows.run(task);
        work(run, static_cast<int>(std::min(rows.block, rows.width - run.shared)), m);
    });
}

}  // namespace

RWKV_PUBLIC int64_t rwkv_interval() { return INTERVAL; }

// k, v, w, u, state, places | y, final state | state before each interval (intervals, C, 3)
RWKV_EXPORT rwkv_forward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    const Rows rows = rows_of(x[5], sizes, threads);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        enum { K, V, DECAY, U, STATE, PLACES, Y, LAST, CHECKPOINTS };
        for_runs(rows, threads, [&](const Run& run, int channels, Interval& m) {
            forward_run(m, tensor<const T>(x, K), tensor<const T>(x, V), tensor<float>(x, DECAY), tensor<float>(x, U),
                        run, channels, tensor<float>(x, STATE), tensor<T>(x, Y), tensor<float>(x, LAST),
                        tensor<float>(x, CHECKPOINTS));
        });
    });
}

// k, v, w, u, state before each interval, places, dy, gradient of the final state | dk, dv, dw, du, gradient of the
// initial state
RWKV_EXPORT rwkv_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const Sizes sizes = sizes_of(numbers);
    const Rows rows = rows_of(x[5], sizes, threads);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        enum { K, V, DECAY, U, CHECKPOINTS, PLACES, DY, DLAST, DK, DV, DW, DU, DSTATE };
        std::vector<float> dw(sizes.rows * sizes.size), du(dw.size());
        const Grads<T> out{tensor<T>(x, DK), tensor<T>(x, DV), dw.data(), du.data()};
        for_runs(rows, threads, [&](const Run& run, int channels, Interval& m) {
            backward_run(m, tensor<const T>(x, K), tensor<const T>(x, V), tensor<float>(x, DECAY), tensor<float>(x, U),
                         run, channels, tensor<float>(x, CHECKPOINTS), tensor<const T>(x, DY), tensor<float>(x, DLAST),
                         out, tensor<float>(x, DSTATE));
        });
        sum_rows(dw, sizes.size, tensor<float>(x, DW));
        sum_rows(du, sizes.size, tensor<float>(x, DU));
    });
}

}  // namespace rwkv
