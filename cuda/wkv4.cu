// WKV-4 on a GPU, forward and backward (recurrence: RWKV, arXiv 2305.13048, section 3.2; ops/wkv4.py). One thread
// runs one channel of one row in float32 and needs nothing of its neighbours, so all accesses are to consecutive
// addresses and nothing is shared but a cache.
//
// Sums p, q are kept as aa e^pp, bb e^pp with a running maximum pp, so that no exponential exceeds 1. Of the two
// weights e^(pp - top), e^(u + k - top) one is always 1: one exponential gives both.
//
// Backward runs over the intervals from the last to the first, each twice: forwards from its checkpoint to have p, q
// before every token, then backwards with P = dL/dp and Q = -dL/dq, which have a scale mm of their own.
#include "device.h"

namespace rwkv {
namespace {

constexpr int THREADS = 64;
constexpr int REGISTERS = 128;
constexpr int SHORT = 32;  // tokens between checkpoints: what is before each of them must fit shared memory
constexpr int GROUP = 8;   // tokens read at once: the recurrence of one group hides the reading of the next

struct Arguments {
    Sizes sizes;
    Places places;
    const void *k, *v;
    const float *w, *u;
};

// aa e^pp and bb e^pp
struct Sums {
    float aa, bb, pp;
};

// e^x for x <= 0: the error of the product is one of x's own rounding, and e^x is all the smaller
DEVICE float decayed(float x) { return exp2_fast(x * LOG2E); }

// Weights of two terms with logarithms x and y relative to the larger one.
struct Weights {
    float first, second, top;
    DEVICE Weights(float x, float y) {
        const float small = decayed(-fabsf(x - y));
        first = x >= y ? 1.f : small;
        second = x >= y ? small : 1.f;
        top = x >= y ? x : y;
    }
};

DEVICE void advance(Sums& s, float k, float v, float d) {
    const Weights keep(s.pp + d, k);
    s.aa = s.aa * keep.first + keep.second * v;
    s.bb = s.bb * keep.first + keep.second;
    s.pp = keep.top;
}

// Which row and channel a thread has; false for threads beyond the last channel.
struct Lane {
    int64_t row, channel, first, tokens;
    bool inside;

    DEVICE Lane(const Arguments& x) {
        const int64_t blocks = (x.sizes.size + THREADS - 1) / THREADS;
        row = x.places.order[block_index() / blocks];
        channel = block_index() % blocks * THREADS + thread_index();
        inside = channel < x.sizes.size;
        first = x.places.starts[row];
        tokens = x.places.starts[row + 1] - first;
    }
};

DEVICE Sums read(const float* from, int64_t at) { return {from[at], from[at + 1], from[at + 2]}; }

DEVICE void write(float* to, int64_t at, const Sums& s) { to[at] = s.aa, to[at + 1] = s.bb, to[at + 2] = s.pp; }

// Up to GROUP tokens from `token` on of one channel; those past `end` are not read.
template <typename T>
struct Group {
    float k[GROUP], v[GROUP];

    DEVICE void read(const Arguments& x, const Lane& lane, int64_t token) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            if (token + i < lane.tokens) {
                const int64_t at = (lane.first + token + i) * x.sizes.size + lane.channel;
                k[i] = widen(static_cast<const T*>(x.k)[at]);
                v[i] = widen(static_cast<const T*>(x.v)[at]);
            }
    }
};

template <typename T>
__global__ void BOUNDS(THREADS, REGISTERS) forward(Arguments x, const float* state, T* y, float* last, float* kept) {
    const Lane lane(x);
    if (!lane.inside) return;
    const float d = -expf(x.w[lane.channel]), u = x.u[lane.channel];
    const int64_t C = x.sizes.size;
    Sums s = read(state, (lane.row * C + lane.channel) * 3);
    int64_t mark = x.places.marks[lane.row];
    Group<T> now, next;
    now.read(x, lane, 0);
    for (int64_t token = 0; token < lane.tokens; token += GROUP) {
        if (kept && token % SHORT == 0) write(kept, (mark++ * C + lane.channel) * 3, s);
        next.read(x, lane, token + GROUP);
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            if (token + i < lane.tokens) {
                const Weights mean(s.pp, u + now.k[i]);
                const float p = s.aa * mean.first + mean.second * now.v[i], q = s.bb * mean.first + mean.second;
                store(y + (lane.first + token + i) * C + lane.channel, p / q);
                advance(s, now.k[i], now.v[i], d);
            }
        now = next;
    }
    write(last, (lane.row * C + lane.channel) * 3, s);
}

struct Gradients {
    void *k, *v;
    float *w, *u, *state;
};

struct Before {
    Sums token[SHORT][THREADS];  // p, q before each token of an interval
};

template <typename T>
__global__ void BOUNDS(THREADS, REGISTERS)
    backward(Arguments x, const float* kept, const T* dy, const float* dlast, Gradients to) {
    SHARED(Before, before);
    const Lane lane(x);
    if (!lane.inside) return;  // there is no barrier: a thread reads only what it wrote
    const float d = -expf(x.w[lane.channel]), u = x.u[lane.channel];
    const int64_t C = x.sizes.size, own = (lane.row * C + lane.channel) * 3;
    if (lane.tokens == 0) return write(to.state, own, read(dlast, own));
    float P = dlast[own], Q = -dlast[own + 1], mm = 0.f;  // times e^mm
    for (int64_t interval = (lane.tokens + SHORT - 1) / SHORT; interval-- > 0;) {
        const int64_t begin = interval * SHORT, mark = x.places.marks[lane.row] + interval;
        const int count = (int)(lane.tokens - begin < SHORT ? lane.tokens - begin : SHORT);
        Sums s = read(kept, (mark * C + lane.channel) * 3);
        Group<T> tokens;
        for (int t = 0; t < count; t += GROUP) {
            tokens.read(x, lane, begin + t);
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
                if (t + i < count) {
                    before.token[t + i][thread_index()] = s;
                    advance(s, tokens.k[i], tokens.v[i], d);
                }
        }
        if (begin + count == lane.tokens) mm = -s.pp;  // the final state is s: its aa is p e^-pp
        float dd = 0.f, du = 0.f;
        for (int t = count; t-- > 0;) {
            const int64_t at = (lane.first + begin + t) * C + lane.channel;
            const float k = widen(static_cast<const T*>(x.k)[at]), v = widen(static_cast<const T*>(x.v)[at]);
            const Sums past = before.token[t][thread_index()];
            const Weights mean(past.pp, u + k);
            const float q = past.bb * mean.first + mean.second;
            const float y = (past.aa * mean.first + mean.second * v) / q, g = widen(dy[at]) / q;  // g e^-top = dy / D
            const float direct = mean.second * g, later = decayed(k + mm);
            const float bonus = direct * (v - y);
            store(static_cast<T*>(to.v) + at, direct + later * P);
            store(static_cast<T*>(to.k) + at, bonus + later * (v * P - Q));
            du += bonus;
            dd += decayed(d + mm + past.pp) * (P * past.aa - Q * past.bb);
            const Weights sum(d + mm, -mean.top);
            P = P * sum.first + g * sum.second;
            Q = Q * sum.first + g * y * sum.second;
            mm = sum.top;
        }
        to.w[mark * C + lane.channel] = dd * d;  // d = -e^w, so dd/dw = d
        to.u[mark * C + lane.channel] = du;
    }
    const Sums start = read(kept, (x.places.marks[lane.row] * C + lane.channel) * 3);
    const float scale = decayed(mm + start.pp), daa = scale * P, dbb = -scale * Q;
    write(to.state, own, {daa, dbb, start.aa * daa + start.bb * dbb});
}

int64_t blocks_of(const Sizes& sizes) { return sizes.rows * ((sizes.size + THREADS - 1) / THREADS); }

}  // namespace
}  // namespace rwkv

RWKV_PUBLIC int64_t rwkv_interval() { return rwkv::SHORT; }

// k, v, w, u, state, places | y, final state | states before each interval
RWKV_EXPORT rwkv_forward(void* const* tensors, const int64_t* sizes_, int dtype, int device, void* stream) {
    using namespace rwkv;
    const OnDevice here(device);
    const Sizes sizes = sizes_of(sizes_);
    const Arguments x{sizes,      Places(tensors[5], sizes), tensors[0],
                      tensors[1], tensor<float>(tensors, 2), tensor<float>(tensors, 3)};
    const char* refused = by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        launch(forward<T>, blocks_of(sizes), THREADS, Stream(stream), x, (const float*)tensors[4],
               tensor<T>(tensors, 6), tensor<float>(tensors, 7), tensor<float>(tensors, 8));
    });
    return refused ? refused : here.error();
}

// k, v, w, u, states before each interval, places, dy, dlast | dk, dv, dw and du of each interval, dstate
RWKV_EXPORT rwkv_backward(void* const* tensors, const int64_t* sizes_, int dtype, int device, void* stream) {
    using namespace rwkv;
    const OnDevice here(device);
    const Sizes sizes = sizes_of(sizes_);
    const Arguments x{sizes,      Places(tensors[5], sizes), tensors[0],
                      tensors[1], tensor<float>(tensors, 2), tensor<float>(tensors, 3)};
    const Gradients to{tensors[8], tensors[9], tensor<float>(tensors, 10), tensor<float>(tensors, 11),
                       tensor<float>(tensors, 12)};
    const char* refused = by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        launch(backward<T>, blocks_of(sizes), THREADS, Stream(stream), x, (const float*)tensors[4],
               (const T*)tensors[6], (const float*)tensors[7], to);
    });
    return refused ? refused : here.error();
}
