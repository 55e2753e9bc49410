// WKV-6 and WKV-5.2 on a GPU, forward and backward (recurrences and gradients: "Eagle and Finch", arXiv 2404.05892,
// section 4; ops/wkv6.py). They differ in the decay alone: WKV-5.2 reads one row of w for all tokens.
//
// Letters: N head size, i value index (state rows), j key index (state columns), d decay, S state, G = dL/dS after a
// token. Nothing in these recurrences mixes two rows or two columns of S, so a thread holds a few of them and sums
// along them only; LANES threads share one.
//
// 1. `sweep`, rows. Forwards: y = S r + (r u k) v, then S = S d + v k^T. Backwards in time the same code, with r and k
//    exchanged and dy for v, gives dv = G k + (r u k) dy and G = G d + dy r^T. It keeps S before, or G after, each
//    interval of INTERVAL tokens.
// 2. `gradients`, columns, for all intervals side by side. Forwards from the kept S: dr = S^T dy + c u k with
//    c = dy . v. Then backwards from the kept G: dk = G^T v + c u r. With P = sum_i G_i S_i, known exactly at the
//    interval's end, the gradient of log d is P - k (G^T v), and P before the token is that + r (S^T dy). No state is
//    stored, and the running difference is exact anew every INTERVAL tokens.
#pragma once

#include <type_traits>

#include "wkv56_tile.h"

namespace rwkv {
namespace {

// Below this log decay (e^-17 = 4e-8) the gradient of the decay is zero to float32 beside P, from which it is taken.
constexpr float FAST = -17.f;

// ---------------------------------------------------------------- along rows

// Forwards: dots r, adds k, scales v, out y. Backwards: dots k, adds r, scales dy, out dv.
template <typename T, typename W>
struct Sweep {
    Sizes sizes;
    Places places;
    const T *dots, *adds, *scales;
    const W* w;
    int64_t w_stride;  // between tokens; 0 for WKV-5.2
    const float *u, *state;
    T* out;
    float *state_out, *kept;  // kept may be null
};

template <int N, int OWN>
struct SweepStage {
    alignas(16) float dots[L][N], adds[L][N], decay[L][N], scales[L][OWN], bonus[L];
};

template <int N, int OWN, bool BACK, typename T, typename W>
__global__ void BOUNDS((threads<N, OWN>), (OWN < Tile<N>::WHOLE ? 168 : REGISTERS)) sweep(Sweep<T, W> x) {
    using Own = Tile<N>;
    constexpr int THREADS = threads<N, OWN>, PARTS = N / OWN, LANES = Own::LANES;
    using Stage = SweepStage<N, OWN>;
    SHARED(Stage, stage);
    const int64_t head = block_index() / PARTS % x.sizes.heads, H = x.sizes.heads, stride = H * N;
    const int64_t row = x.places.order[block_index() / PARTS / H];
    const int part = (int)(block_index() % PARTS) * OWN, vector = thread_index() / LANES * VECTORS;
    const int mine = vector + owned<VECTORS, 1, LANES>(thread_index());  // the value whose sum this thread gets
    const int64_t tokens = x.places.starts[row + 1] - x.places.starts[row];
    const int64_t begin = x.places.starts[row] * stride + head * N;
    const int64_t w_begin = x.places.starts[row] * x.w_stride + head * N;

    // This thread's numbers of a matrix (N, N), from the first of its value rows.
    const auto each = [&](auto* matrix, auto&& f) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll
            for (int piece = 0; piece < Own::PIECES; ++piece)
                f(matrix + (int64_t)(part + vector + v) * N + Own::at(piece), v, piece * 4);
    };
    Matrix<N> S;
    each(x.state + (row * H + head) * N * N, [&](const float* from, int v, int first) {
        const Pack<4> four = load<4>(from);
#pragma unroll
        for (int e = 0; e < 4; ++e) S[v][first + e] = four[e];
    });
    const auto write = [&](float* matrix) {
        each(matrix, [&](float* to, int v, int first) {
            Pack<4> four;
#pragma unroll
            for (int e = 0; e < 4; ++e) four[e] = S[v][first + e];
            store(to, four);
        });
    };

    Fetch<N, THREADS, T> dots, adds;
    Fetch<N, THREADS, W> w;
    Fetch<OWN, THREADS, T> scales;
    const Pack<4> u = load<4>(x.u + head * N + dots.column());
    const int64_t tiles = (tokens + L - 1) / L;
    const auto fetch = [&](int64_t tile) {
        const int64_t first = tile * L;
        const int count = first < 0 ? 0 : (int)(tokens - first < L ? tokens - first : L);
        dots.read(x.dots + begin + first * stride, stride, count);
        adds.read(x.adds + begin + first * stride, stride, count);
        w.read(x.w + w_begin + first * x.w_stride, x.w_stride, count);
        scales.read(x.scales + begin + part + first * stride, stride, count);
    };
    fetch(BACK ? tiles - 1 : 0);
    for (int64_t turn = 0; turn < tiles; ++turn) {
        const int64_t tile = BACK ? tiles - 1 - turn : turn, first = tile * L;
        const int count = (int)(tokens - first < L ? tokens - first : L);
        sync();
        dots.put(stage.dots);
        adds.put(stage.adds);
        w.put(stage.decay, [](const Pack<4>& raw) { return exponential(log_decay(raw)); });
        scales.put(stage.scales);
        dot_products(dots, adds, u, stage.bonus);
        sync();
        fetch(BACK ? tile - 1 : tile + 1);
        const bool edge = BACK ? first + L >= tokens || (first + L) % INTERVAL == 0 : first % INTERVAL == 0;
        if (x.kept && edge) write(x.kept + ((x.places.marks[row] + first / INTERVAL) * H + head) * N * N);
        for (int step = 0; step < count; ++step) {
            const int t = BACK ? count - 1 - step : step;
            const Pack<VECTORS> scale = load<VECTORS>(stage.scales[t] + vector);
            const float sum = row_step<N>(S, stage.dots[t], stage.adds[t], stage.decay[t], scale);
            if (writes<VECTORS, 1, LANES>(thread_index()))
                store(x.out + begin + part + (first + t) * stride + mine, sum + stage.bonus[t] * stage.scales[t][mine]);
        }
    }
    write(x.state_out + (row * H + head) * N * N);
}

// ---------------------------------------------------------------- along columns

template <typename T, typename W>
struct Columns {
    Sizes sizes;
    Places places;
    const T *r, *k, *v, *dy;
    const W* w;
    int64_t w_stride;
    const float *u, *before, *after;  // the states before, and G after, each interval
    T *dr, *dk;
    W* dw;      // WKV-6: a gradient for each token; WKV-5.2: for each interval
    float* du;  // for each interval
};

template <int N, int OWN>
struct ColumnStage {
    alignas(16) float v[L][N], dy[L][N], r[L][OWN], k[L][OWN], log_decay[L][OWN], c[L];
    float dr[INTERVAL][OWN];  // S^T dy
};

template <int N, typename T, typename W>
__global__ void BOUNDS((threads<N, Tile<N>::WHOLE>), REGISTERS) gradients(Columns<T, W> x) {
    using Own = Tile<N>;
    constexpr int OWN = Own::WHOLE, THREADS = threads<N, OWN>, PARTS = N / OWN, LANES = Own::LANES;
    using Stage = ColumnStage<N, OWN>;
    SHARED(Stage, stage);
    const int64_t head = block_index() / PARTS % x.sizes.heads, H = x.sizes.heads, stride = H * N;
    const int64_t interval = block_index() / PARTS / H, row = x.places.row_of(interval);
    const int part = (int)(block_index() % PARTS) * OWN, vector = thread_index() / LANES * VECTORS;
    const int mine = vector + owned<VECTORS, 1, LANES>(thread_index());  // the key whose sums this thread gets
    const bool writer = writes<VECTORS, 1, LANES>(thread_index());
    const int64_t token = x.places.starts[row] + (interval - x.places.marks[row]) * INTERVAL;
    const int64_t rest = x.places.starts[row + 1] - token;
    const int tokens = (int)(rest < INTERVAL ? rest : INTERVAL);
    const int64_t begin = token * stride + head * N, w_begin = token * x.w_stride + head * N;
    const float u = x.u[head * N + part + mine];

    Matrix<N> m;
    const auto read = [&](const float* matrix) {  // columns part + vector + 0 .. VECTORS of a matrix (N, N)
#pragma unroll
        for (int piece = 0; piece < Own::PIECES; ++piece)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Pack<VECTORS> keys = load<VECTORS>(matrix + (int64_t)(Own::at(piece) + e) * N + part + vector);
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) m[v][piece * 4 + e] = keys[v];
            }
    };
    const auto bring = [&](int first) {  // tokens first .. first + L of the interval
        Fetch<N, THREADS, T> v, dy;
        Fetch<OWN, THREADS, T> r, k;
        Fetch<OWN, THREADS, W> w;
        const int count = tokens - first < L ? tokens - first : L;
        v.read(x.v + begin + first * stride, stride, count);
        dy.read(x.dy + begin + first * stride, stride, count);
        r.read(x.r + begin + part + first * stride, stride, count);
        k.read(x.k + begin + part + first * stride, stride, count);
        w.read(x.w + w_begin + part + first * x.w_stride, x.w_stride, count);
        sync();
        v.put(stage.v);
        dy.put(stage.dy);
        r.put(stage.r);
        k.put(stage.k);
        w.put(stage.log_decay, [](const Pack<4>& raw) { return log_decay(raw); });
        dot_products(v, dy, Pack<4>{{1.f, 1.f, 1.f, 1.f}}, stage.c);
        sync();
        return count;
    };
    const auto decays = [&](int t) {
        Pack<VECTORS> decay = load<VECTORS>(stage.log_decay[t] + vector);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) decay[v] = expf(decay[v]);
        return decay;
    };

    const int64_t matrix = (interval * H + head) * N * N;
    read(x.before + matrix);
    float du = 0.f;
    for (int first = 0; first < tokens; first += L) {
        const int count = bring(first);
        for (int t = 0; t < count; ++t) {
            const Pack<VECTORS> keys = load<VECTORS>(stage.k[t] + vector);
            const float dr = column_step<N>(m, stage.dy[t], stage.v[t], decays(t), keys);
            const float ck = stage.c[t] * stage.k[t][mine];
            du += ck * stage.r[t][mine];
            if (!writer) continue;
            stage.dr[first + t][mine] = dr;
            store(x.dr + begin + part + (first + t) * stride + mine, dr + u * ck);
        }
    }
    float parts[VECTORS] = {};
#pragma unroll
    for (int piece = 0; piece < Own::PIECES; ++piece)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float* from = x.after + matrix + (int64_t)(Own::at(piece) + e) * N;
            const Pack<VECTORS> keys = load<VECTORS>(from + part + vector);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                parts[v] += keys[v] * m[v][piece * 4 + e];
                m[v][piece * 4 + e] = keys[v];
            }
        }
    float P = scatter_sum<VECTORS, 1, LANES>(parts), dw = 0.f;
    for (int first = (tokens - 1) / L * L; first >= 0; first -= L) {
        const int count = bring(first);
        for (int t = count; t-- > 0;) {
            const Pack<VECTORS> keys = load<VECTORS>(stage.r[t] + vector);
            const float dk = column_step<N>(m, stage.v[t], stage.dy[t], decays(t), keys);
            const float r = stage.r[t][mine], log = stage.log_decay[t][mine];
            const float slope = log < FAST ? 0.f : P - stage.k[t][mine] * dk;  // dL/d(log decay)
            P = slope + r * stage.dr[first + t][mine];
            const float raw = log < FAST ? 0.f : slope * log;  // log = -e^w, so d(log)/dw = log
            dw += raw;
            if (!writer) continue;
            const int64_t at = part + (first + t) * stride + mine;
            store(x.dk + begin + at, dk + u * stage.c[t] * r);
            if (x.w_stride) store(x.dw + w_begin + at, raw);
        }
    }
    if (!writer) return;
    if (!x.w_stride) store(x.dw + interval * stride + head * N + part + mine, dw);
    x.du[interval * stride + head * N + part + mine] = du;
}

// ---------------------------------------------------------------- launching

template <int N, bool BACK, typename T, typename W>
void launch_sweep(const Sweep<T, W>& x, int device, void* stream) {
    constexpr int WHOLE = Tile<N>::WHOLE, SPLIT = Tile<N>::SPLIT;
    const int64_t heads = x.sizes.rows * x.sizes.heads;
    if (heads * (N / WHOLE) < 2 * processors(device))
        launch(sweep<N, SPLIT, BACK, T, W>, heads * (N / SPLIT), threads<N, SPLIT>, Stream(stream), x);
    else
        launch(sweep<N, WHOLE, BACK, T, W>, heads * (N / WHOLE), threads<N, WHOLE>, Stream(stream), x);
}

// r, k, v, w, u, state, places | y, final state | states before each interval
template <bool PER_TOKEN>
const char* forward56(void* const* tensors, const Sizes& sizes, int dtype, int device, void* stream) {
    const OnDevice here(device);
    const char* refused = dispatch(sizes, dtype, [&](auto size, auto element) {
        constexpr int N = decltype(size)::value;
        using T = decltype(element);
        using W = std::conditional_t<PER_TOKEN, T, float>;
        const Sweep<T, W> x{sizes,
                            Places(tensors[6], sizes),
                            tensor<T>(tensors, 0),
                            tensor<T>(tensors, 1),
                            tensor<T>(tensors, 2),
                            tensor<W>(tensors, 3),
                            PER_TOKEN ? sizes.heads * N : 0,
                            tensor<float>(tensors, 4),
                            tensor<float>(tensors, 5),
                            tensor<T>(tensors, 7),
                            tensor<float>(tensors, 8),
                            tensor<float>(tensors, 9)};
        launch_sweep<N, false>(x, device, stream);
    });
    return refused ? refused : here.error();
}

// r, k, v, w, u, states before each interval, places, dy, dlast | dr, dk, dv, dw, du, dstate | G after each interval
template <bool PER_TOKEN>
const char* backward56(void* const* tensors, const Sizes& sizes, int dtype, int device, void* stream) {
    const OnDevice here(device);
    const char* refused = dispatch(sizes, dtype, [&](auto size, auto element) {
        constexpr int N = decltype(size)::value;
        using T = decltype(element);
        using W = std::conditional_t<PER_TOKEN, T, float>;
        const Places places(tensors[6], sizes);
        const int64_t w_stride = PER_TOKEN ? sizes.heads * N : 0;
        const T *r = tensor<T>(tensors, 0), *k = tensor<T>(tensors, 1), *v = tensor<T>(tensors, 2);
        const T* dy = tensor<T>(tensors, 7);
        const W* w = tensor<W>(tensors, 3);
        const float *u = tensor<float>(tensors, 4), *before = tensor<float>(tensors, 5);
        float* after = tensor<float>(tensors, 15);
        launch_sweep<N, true>(Sweep<T, W>{sizes, places, k, r, dy, w, w_stride, u, tensor<float>(tensors, 8),
                                          tensor<T>(tensors, 11), tensor<float>(tensors, 14), after},
                              device, stream);
        const Columns<T, W> x{sizes,
                              places,
                              r,
                              k,
                              v,
                              dy,
                              w,
                              w_stride,
                              u,
                              before,
                              after,
                              tensor<T>(tensors, 9),
                              tensor<T>(tensors, 10),
                              tensor<W>(tensors, 12),
                              tensor<float>(tensors, 13)};
        constexpr int WHOLE = Tile<N>::WHOLE;
        launch(gradients<N, T, W>, sizes.intervals * sizes.heads * (N / WHOLE), threads<N, WHOLE>, Stream(stream), x);
    });
    return refused ? refused : here.error();
}

}  // namespace
}  // namespace rwkv
