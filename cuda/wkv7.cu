// WKV-7 on a GPU in float32, forward and backward (recurrence and gradients: RWKV-7 "Goose", arXiv 2503.14456;
// src/ops/wkv7.py). Exact for any decay and length: states only run forwards, from checkpoints, never back.
//
// Letters: N head size, i value index (state rows), j key index (state columns), d decay, S state, G = dL/dS.
//
// Value rows of S and G need nothing of each other:
//     S_i = S_i d_t + sa_i b_t + v_i k_t;   y_i = S_i . r_t;   sa_i of the next token = S_i . a_{t+1}
//     G_i = G_i d_{t+1} + dsa_i a_{t+1} + dy_i r_t;   dv_i = G_i . k_t;   dsa_i = G_i . b_t           (t falling)
// so one kernel, `rows`, is both sweeps over the tokens. Once sa and dsa are known, key columns need nothing of each
// other either, and with S and G known at every 64th token nor do the intervals between those. `columns` therefore runs
// each interval and head as a block of its own, first with S (da, dr), then with G (dk, db, dw).
//
// The decay's gradient comes without a sum of its own: sum_i G_ij S_ij, P_t, changes from token to token by
//     dlogd_t = P_t - k_t dk_t - b_t db_t;   P_{t-1} = dlogd_t + a_t da_t + r_{t-1} dr_{t-1}
// and is summed afresh at the end of every interval, where S and G meet, so that no rounding is carried further.
//
// A thread holds R rows (columns) by PIECE numbers of S or G in registers; the PARTS threads that share a row add their
// dot products by shuffles. Vectors are read from a stage in shared memory, which is filled a few tokens ahead.
#include "device.h"

namespace rwkv {
namespace {

constexpr int INTERVAL = 64;  // as in src/ops/gpu.py
constexpr float RATE = 0.60653066f, LOG2E = 1.44269504f;
constexpr int REGISTERS = 128;
constexpr int NARROW = 3;  // fewer blocks than this for each multiprocessor: smaller blocks, of one row per thread

// How the threads of a block share an N by (SLOTS R) tile. Threads that differ in their lowest bits have other rows of
// the same piece, so that the 8 threads whose 16-byte reads are served together want at most 2 places.
template <int N>
struct Tile {
    static constexpr int THREADS = N == 128 ? 128 : 64;
    static constexpr int PIECE = N == 32 ? 8 : 16;  // in packs of 4, each 4 * PARTS after the last
    static constexpr int PARTS = N / PIECE;
    static constexpr int LOW = 32 / PARTS;  // sums run over the thread bits LOW .. 16
    static constexpr int SLOTS = THREADS / PARTS;
    static constexpr int R = N == 32 ? 2 : 4;  // rows of a thread

    int slot, first;  // of a thread: its rows are slot * R .., its piece begins at first
    DEVICE explicit Tile(int thread)
        : slot(thread / 32 * LOW + thread % LOW), first(thread / LOW % PARTS * 4) {}
};

// ---------------------------------------------------------------- the stage

struct Decay {
    float value, slope;  // d = exp(-RATE sigmoid(w)), d(log d)/dw
};

// In bits of d, exp2_fast and reciprocal_fast are off by no more than rounding d is. w = -infinity gives 1 and 0.
DEVICE Decay decay_of(float w) {
    const float q = exp2_fast(-fabsf(w) * LOG2E), inverse = reciprocal_fast(1.f + q);
    return {exp2_fast((w < 0 ? q * inverse : inverse) * (-RATE * LOG2E)), -RATE * q * inverse * inverse};
}

// What stands for a token that is not there: no decay, and zeros.
template <typename T>
DEVICE T missing(bool decay) {
    T x;
    narrow(decay ? -INFINITY : 0.f, x);
    return x;
}

// ---------------------------------------------------------------- rows: sweeps over all tokens

// M = M diag(d) + x A^T + u U^T;  y = M Y;  x = M X, which is the x of the next step.
enum Vector { DECAY, A, U, Y, X, VALUES, VECTORS };

template <typename T>
struct RowSweep {
    Sizes sizes;
    Places places;
    Pack<VECTORS, const T*> vectors;  // w, A, U, Y, X and u
    const float* begin;         // M before the first step
    T* y;
    float *x, *checkpoints, *end;  // x and checkpoints may be null
};

// One block: SLOTS R value rows of one head of one row of the batch. Step s = 0 .. T: forward updates M with token s - 1
// and makes x for token s; REVERSE (order of tokens reversed) decays M by token s - 1 and does the rest for token s.
template <int N, int R, bool REVERSE, typename T>
__global__ void BOUNDS(Tile<N>::THREADS, REGISTERS) rows(const RowSweep<T> args) {
    using Shape = Tile<N>;
    constexpr int THREADS = Shape::THREADS, PIECE = Shape::PIECE, PARTS = Shape::PARTS, LOW = Shape::LOW;
    constexpr int ROWS = Shape::SLOTS * R, BLOCKS = N / ROWS;
    constexpr int STAGE = 4;                               // tokens that are read while as many others are filled in
    struct Stage {
        alignas(16) float at[2 * STAGE][5 * N + ROWS];
    };
    SHARED(Stage, stage);

    const int thread = thread_index();
    const Shape tile(thread);
    const int64_t task = block_index() / BLOCKS;
    const int64_t row = args.places.order[task / args.sizes.heads], head = task % args.sizes.heads;
    const int value = int(block_index() % BLOCKS) * ROWS;  // the first of this block's rows
    const int64_t begin = args.places.starts[row], stride = args.sizes.heads * N;
    const int tokens = int(args.places.starts[row + 1] - begin);
    const int64_t origin = begin * stride + head * N;

    // Each thread brings one number of every vector of a token to the stage.
    struct Ahead {
        T at[VECTORS];
    };
    const auto fetch = [&](int step) {
        Ahead ahead;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const bool late = REVERSE ? vector <= A : vector != X;
            const int order = step - late, token = REVERSE ? tokens - 1 - order : order;
            const bool there = order >= 0 && order < tokens && thread < (vector == VALUES ? ROWS : N);
            const int64_t at = origin + token * stride + thread + (vector == VALUES ? value : 0);
            ahead.at[vector] = there ? args.vectors[vector][at] : missing<T>(vector == DECAY);
        }
        return ahead;
    };
    const auto put = [&](int step, const Ahead& ahead) {
        float* place = stage.at[step % (2 * STAGE)] + thread;
        if (thread < N) place[DECAY * N] = decay_of(widen(ahead.at[DECAY])).value;
#pragma unroll
        for (int vector = DECAY + 1; vector < VECTORS; ++vector)
            if (thread < (vector == VALUES ? ROWS : N)) place[vector * N] = widen(ahead.at[vector]);
    };

    float m[R][PIECE], x[R] = {};
    const int64_t state = ((row * args.sizes.heads + head) * N + value + tile.slot * R) * N + tile.first;
    const auto save = [&](float* to) {
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int c = 0; c < PIECE; c += 4)
                store<4>(to + r * N + c * PARTS, {{m[r][c], m[r][c + 1], m[r][c + 2], m[r][c + 3]}});
    };
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < PIECE; c += 4) {
            const Pack<4> four = load<4>(args.begin + state + r * N + c * PARTS);
            for (int e = 0; e < 4; ++e) m[r][c + e] = four[e];
        }
    for (int step = 0; step < STAGE; ++step) put(step, fetch(step));

    const int own = owned<R, LOW, 32>(thread);  // the row, of the R, whose sums this thread writes
    const bool writer = writes<R, LOW, 32>(thread);
    const int64_t out = origin + value + tile.slot * R + own;
    const int64_t first_checkpoint = args.places.marks[row];

    for (int step = 0; step <= tokens; ++step) {
        if (step % STAGE == 0) sync();  // the half to be read is complete, and nobody reads the other any more
        const Ahead ahead = fetch(step + STAGE);
        const float* now = stage.at[step % (2 * STAGE)];
        const Pack<R> u = load<R>(now + VALUES * N + tile.slot * R);
        float y[R] = {}, next[R] = {};
#pragma unroll
        for (int c = 0; c < PIECE; c += 4) {
            const float* from = now + tile.first + c * PARTS;
            const Pack<4> decay = load<4>(from + DECAY * N), A_ = load<4>(from + A * N), U_ = load<4>(from + U * N);
            const Pack<4> Y_ = load<4>(from + Y * N), X_ = load<4>(from + X * N);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    float& cell = m[r][c + e];
                    cell = cell * decay[e] + u[r] * U_[e];
                    cell += x[r] * A_[e];
                    y[r] += cell * Y_[e];
                    next[r] += cell * X_[e];
                }
        }
        float mine = 0;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            x[r] = sum_over<LOW, 32>(next[r]);
            mine = r == own ? x[r] : mine;
        }
        const float sum = scatter_sum<R, LOW, 32>(y);

        const int y_order = REVERSE ? step : step - 1;
        const int64_t y_token = REVERSE ? tokens - 1 - y_order : y_order, x_token = REVERSE ? y_token : step;
        if (writer && y_order >= 0 && y_order < tokens) store(args.y + out + y_token * stride, sum);
        if (writer && args.x && step < tokens) args.x[out + x_token * stride] = mine;
        const bool edge = REVERSE ? (y_token + 1) % INTERVAL == 0 || step == 0 : step % INTERVAL == 0;
        if (args.checkpoints && edge && step < tokens) {
            const int64_t interval = first_checkpoint + x_token / INTERVAL;
            save(args.checkpoints + state + ((interval - row) * args.sizes.heads) * N * N);
        }
        put(step + STAGE, ahead);
    }
    save(args.end + state);
}

template <bool REVERSE, typename T, int N>
void run_rows(const RowSweep<T>& args, int device, Stream stream, Constant<N>) {
    using Shape = Tile<N>;
    const auto blocks = [&](int r) { return args.sizes.rows * args.sizes.heads * (N / (Shape::SLOTS * r)); };
    if (blocks(Shape::R) < NARROW * processors(device))
        launch(rows<N, 1, REVERSE, T>, blocks(1), Shape::THREADS, stream, args);
    else
        launch(rows<N, Shape::R, REVERSE, T>, blocks(Shape::R), Shape::THREADS, stream, args);
}

// ---------------------------------------------------------------- columns: one interval at a time

template <typename T>
struct Columns {
    Sizes sizes;
    Places places;
    const T *r, *w, *k, *v, *a, *b, *dy;
    const float *sa, *dsa, *S, *G;  // S before each interval, G at its last token
    float* change;                  // P_t - dlogd_{t+1}, between the two passes
    T *dr, *dw, *dk, *da, *db;
};

// One block: SLOTS R key columns of one head in one interval.
template <int N, typename T>
__global__ void BOUNDS(Tile<N>::THREADS, REGISTERS) columns(const Columns<T> args) {
    using Shape = Tile<N>;
    constexpr int THREADS = Shape::THREADS, PIECE = Shape::PIECE, PARTS = Shape::PARTS, LOW = Shape::LOW, R = Shape::R;
    constexpr int KEYS = Shape::SLOTS * R, BLOCKS = N / KEYS;
    constexpr int STAGE = 2;
    // A token on the stage: N numbers of each of the first four, then KEYS of each of the others.
    constexpr int DY = 0, V = N, SA = 2 * N, DSA = 3 * N;
    constexpr int W = 4 * N, K_ = W + KEYS, A_ = K_ + KEYS, B_ = A_ + KEYS, R_ = B_ + KEYS, SLOPE = R_ + KEYS;
    struct Stage {
        alignas(16) float at[2 * STAGE][SLOPE + KEYS];
    };
    SHARED(Stage, stage);

    const int thread = thread_index();
    const Shape tile(thread);
    const int64_t task = block_index() / BLOCKS, heads = args.sizes.heads;
    const int64_t interval = task / heads, head = task % heads, row = args.places.row_of(interval);
    const int key = int(block_index() % BLOCKS) * KEYS;  // the first of this block's columns
    const int64_t begin = args.places.starts[row] + (interval - args.places.marks[row]) * INTERVAL;
    const int64_t left = args.places.starts[row + 1] - begin, stride = heads * N;
    const int tokens = int(left < INTERVAL ? left : INTERVAL);
    const int64_t origin = begin * stride + head * N;

    struct Ahead {
        T dy, v, w, k, a, b, r;
        float sa, dsa;
    };
    const auto fetch = [&](int token) {
        Ahead x;
        const int64_t value_at = origin + token * stride + thread, key_at = value_at + key;
        if (thread < N && token >= 0 && token < tokens) {
            x.dy = args.dy[value_at], x.v = args.v[value_at], x.sa = args.sa[value_at], x.dsa = args.dsa[value_at];
            if (thread < KEYS) {
                x.w = args.w[key_at], x.k = args.k[key_at], x.a = args.a[key_at], x.b = args.b[key_at];
                x.r = args.r[key_at];
            }
        }
        return x;
    };
    const auto put = [&](int step, const Ahead& x) {
        float* place = stage.at[step % (2 * STAGE)] + thread;
        if (thread < N) {
            place[DY] = widen(x.dy), place[V] = widen(x.v), place[SA] = x.sa, place[DSA] = x.dsa;
            if (thread < KEYS) {
                const Decay decay = decay_of(widen(x.w));
                place[W] = decay.value, place[SLOPE] = decay.slope, place[K_] = widen(x.k), place[A_] = widen(x.a);
                place[B_] = widen(x.b), place[R_] = widen(x.r);
            }
        }
    };

    const int own = tile.slot * R + owned<R, LOW, 32>(thread);  // the column whose sums this thread has
    const bool writer = writes<R, LOW, 32>(thread);
    const int64_t out = origin + key + own;
    const int64_t state = ((interval * heads + head) * N + tile.first) * N + key + tile.slot * R;
    const auto cell_of = [](int c) { return (c / 4 * 4 * PARTS + c % 4) * N; };

    float m[R][PIECE];  // a column's piece of S, later of G
#pragma unroll
    for (int c = 0; c < PIECE; ++c) {
        const Pack<R> column = load<R>(args.S + state + cell_of(c));
#pragma unroll
        for (int r = 0; r < R; ++r) m[r][c] = column[r];
    }
    for (int step = 0; step < STAGE; ++step) put(step, fetch(step));
    float rdr = 0;  // r_t dr_t of the token before
    for (int t = 0; t < tokens; ++t) {
        if (t % STAGE == 0) sync();
        const Ahead ahead = fetch(t + STAGE);
        const float* now = stage.at[t % (2 * STAGE)];
        const Pack<R> d = load<R>(now + W + tile.slot * R), k = load<R>(now + K_ + tile.slot * R);
        const Pack<R> b = load<R>(now + B_ + tile.slot * R);
        float da[R] = {}, dr[R] = {};
#pragma unroll
        for (int c = 0; c < PIECE; c += 4) {
            const float* from = now + tile.first + c * PARTS;
            const Pack<4> dsa = load<4>(from + DSA), sa = load<4>(from + SA), v = load<4>(from + V);
            const Pack<4> dy = load<4>(from + DY);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    float& cell = m[r][c + e];
                    da[r] += cell * dsa[e];
                    cell = cell * d[r] + b[r] * sa[e];
                    cell += k[r] * v[e];
                    dr[r] += cell * dy[e];
                }
        }
        const float da_own = scatter_sum<R, LOW, 32>(da), dr_own = scatter_sum<R, LOW, 32>(dr);
        if (writer) {
            const int64_t at = out + t * stride;
            store(args.da + at, da_own);
            store(args.dr + at, dr_own);
            if (t > 0) args.change[at - stride] = rdr + now[A_ + own] * da_own;
            rdr = now[R_ + own] * dr_own;
        }
        put(t + STAGE, ahead);
    }

    float both[R] = {};
#pragma unroll
    for (int c = 0; c < PIECE; ++c) {
        const Pack<R> column = load<R>(args.G + state + cell_of(c));
#pragma unroll
        for (int r = 0; r < R; ++r) {
            both[r] += m[r][c] * column[r];
            m[r][c] = column[r];
        }
    }
    float P = scatter_sum<R, LOW, 32>(both);
    sync();  // nobody reads the stage of the first pass any more
    for (int step = 0; step < STAGE; ++step) put(step, fetch(tokens - 1 - step));
    for (int step = 0; step < tokens; ++step) {
        if (step % STAGE == 0) sync();
        const int t = tokens - 1 - step;
        const Ahead ahead = fetch(t - STAGE);
        const int64_t at = out + t * stride;
        const float change = writer && t > 0 ? args.change[at - stride] : 0.f;
        const float* now = stage.at[step % (2 * STAGE)];
        const Pack<R> d = load<R>(now + W + tile.slot * R), a = load<R>(now + A_ + tile.slot * R);
        Pack<R> r_ = load<R>(now + R_ + tile.slot * R);
#pragma unroll
        for (int r = 0; r < R; ++r) r_[r] = step > 0 ? r_[r] : 0.f;  // the G of the last token has its share already
        float dk[R] = {}, db[R] = {};
#pragma unroll
        for (int c = 0; c < PIECE; c += 4) {
            const float* from = now + tile.first + c * PARTS;
            const Pack<4> dsa = load<4>(from + DSA), sa = load<4>(from + SA), v = load<4>(from + V);
            const Pack<4> dy = load<4>(from + DY);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    float& cell = m[r][c + e];
                    cell += r_[r] * dy[e];
                    dk[r] += cell * v[e];
                    db[r] += cell * sa[e];
                    cell = cell * d[r] + a[r] * dsa[e];
                }
        }
        const float dk_own = scatter_sum<R, LOW, 32>(dk), db_own = scatter_sum<R, LOW, 32>(db);
        if (writer) {
            const float dlogd = P - now[K_ + own] * dk_own - now[B_ + own] * db_own;
            store(args.dk + at, dk_own);
            store(args.db + at, db_own);
            store(args.dw + at, dlogd * now[SLOPE + own]);
            P = dlogd + change;
        }
        put(step + STAGE, ahead);
    }
}

}  // namespace

// r, w, k, v, a, b, state, places | y, final state | S before each interval (intervals, H, N, N), sa (tokens, H, N)
RWKV_EXPORT rwkv_forward(void* const* x, const int64_t* numbers, int dtype, int device, void* stream) {
    const Sizes sizes = sizes_of(numbers);
    const OnDevice here(device);
    const char* refused = dispatch(sizes, dtype, [&](auto size, auto element) {
        using T = decltype(element);
        enum { R, W, K, V, A, B, STATE, PLACES, Y, LAST, CHECKPOINTS, SA };
        const auto in = [&](int i) { return tensor<const T>(x, i); };
        RowSweep<T> sweep{sizes, Places(x[PLACES], sizes)};
        sweep.vectors = {in(W), in(B), in(K), in(R), in(A), in(V)};
        sweep.begin = tensor<float>(x, STATE), sweep.end = tensor<float>(x, LAST);
        sweep.y = tensor<T>(x, Y), sweep.x = tensor<float>(x, SA), sweep.checkpoints = tensor<float>(x, CHECKPOINTS);
        run_rows<false>(sweep, device, Stream(stream), size);
    });
    return refused ? refused : here.error();
}

// r, w, k, v, a, b, S before each interval, sa, places, dy, gradient of the final state |
// dr, dw, dk, dv, da, db, gradient of the initial state | dsa, G at the last token of each interval, sums
RWKV_EXPORT rwkv_backward(void* const* x, const int64_t* numbers, int dtype, int device, void* stream) {
    const Sizes sizes = sizes_of(numbers);
    const OnDevice here(device);
    const char* refused = dispatch(sizes, dtype, [&](auto size, auto element) {
        using T = decltype(element);
        enum { R, W, K, V, A, B, S, SA, PLACES, DY, DLAST, DR, DW, DK, DV, DA, DB, DSTATE, DSA, G, CHANGE };
        constexpr int N = decltype(size)::value, KEYS = Tile<N>::SLOTS * Tile<N>::R;
        const auto in = [&](int i) { return tensor<const T>(x, i); };
        const auto out = [&](int i) { return tensor<T>(x, i); };
        const auto wide = [&](int i) { return tensor<float>(x, i); };
        const Places places(x[PLACES], sizes);
        RowSweep<T> sweep{sizes, places};
        sweep.vectors = {in(W), in(A), in(R), in(K), in(B), in(DY)};
        sweep.begin = wide(DLAST), sweep.end = wide(DSTATE);
        sweep.y = out(DV), sweep.x = wide(DSA), sweep.checkpoints = wide(G);
        run_rows<true>(sweep, device, Stream(stream), size);
        launch(columns<N, T>, sizes.intervals * sizes.heads * (N / KEYS), Tile<N>::THREADS, Stream(stream),
               Columns<T>{sizes,    places,  in(R),   in(W),    in(K),   in(V),   in(A),   in(B),  in(DY), wide(SA),
                          wide(DSA), wide(S), wide(G), wide(CHANGE), out(DR), out(DW), out(DK), out(DA), out(DB)});
    });
    return refused ? refused : here.error();
}

}  // namespace rwkv
