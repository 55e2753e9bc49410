// WKV-7 on a GPU in float32, forward and backward (recurrence and gradients: RWKV-7 "Goose", arXiv 2503.14456;
// ops/wkv7.py). Exact for any decay and length: states only run forwards, from checkpoints, never back.
//
// Letters: N head size, i value index (state rows), j key index (state columns), d decay, S state, G = dL/dS.
//
// Value rows of S and G need nothing of each other:
//     S_i = S_i d_t + sa_i b_t + v_i k_t;   y_i = S_i . r_t;   sa_i of the next token = S_i . a_{t+1}
//     G_i = G_i d_{t+1} + dsa_i a_{t+1} + dy_i r_t;   dv_i = G_i . k_t;   dsa_i = G_i . b_t           (t falling)
// so one kernel, `rows`, is both sweeps over the tokens. Once sa and dsa are known, key columns need nothing of each
// other either, and with S and G known at every 64th token nor do the intervals between those: a block of `columns`
// takes one interval of one head, first with S, then with G:
//     S_j = S_j d_j + b_j sa_t + k_j v_t;   dr_j = S_j . dy_t;   da_j of the next token = S_j . dsa_{t+1}
//     G_j = G_j d_j + a_j dsa_{t+1} + r_j dy_t;   dk_j = G_j . v_t;   db_j = G_j . sa_t               (t falling)
// All four have the form of `advance`.
//
// The decay's gradient comes without a sum of its own: sum_i G_ij S_ij, P_t, changes from token to token by
//     dlogd_t = P_t - k_t dk_t - b_t db_t;   P_{t-1} = dlogd_t + a_t da_t + r_{t-1} dr_{t-1}
// and is summed afresh at the end of every interval, where S and G meet, so that no rounding is carried further.
//
// A thread holds R rows (columns) by PIECE numbers of S or G in registers; the PARTS threads that share a row add their
// dot products by shuffles. Vectors are read from a stage in shared memory, which is filled a few tokens ahead.
#include <type_traits>

#include "wkv7_tile.h"

namespace rwkv {
namespace {

constexpr int NARROW = 3;  // fewer blocks than this for each multiprocessor: smaller blocks, of one row per thread

// ---------------------------------------------------------------- rows: sweeps over all tokens

enum Vector { DECAY, A, U, Y, X, VALUES, VECTORS };

template <typename T>
struct RowSweep {
    Sizes sizes;
    Places places;
    Pack<VECTORS, const T*> vectors;  // w, A, U, Y, X and u
    const float* begin;               // M before the first step
    T* y;
    float *x, *checkpoints, *end;  // x and checkpoints may be null
};

// One block: SLOTS R value rows of one head of one row of the batch. Step s = 0 .. T: forward updates M with token
// s - 1 and makes x for token s; REVERSE (order of tokens reversed) decays M by token s - 1 and does the rest for s.
template <int N, int R, bool REVERSE, typename T>
__global__ void BOUNDS(Tile<N>::THREADS, (R == Tile<N>::R ? WIDE_REGISTERS : REGISTERS)) rows(const RowSweep<T> args) {
    using Shape = Tile<N>;
    constexpr int PIECE = Shape::PIECE, PARTS = Shape::PARTS, LOW = Shape::LOW;
    constexpr int ROWS = Shape::SLOTS * R, BLOCKS = N / ROWS;
    constexpr int STAGE = 4;  // tokens that are read while as many others are filled in
    struct Stage {
        alignas(16) float at[2 * STAGE][5 * N + ROWS];
        int64_t state, checkpoint;  // where this block's rows are in begin, and in the first checkpoint of its row
    };
    SHARED(Stage, stage);

    const int thread = thread_index();
    const Shape tile(thread);
    const unsigned task = unsigned(block_index()) / BLOCKS, heads = unsigned(args.sizes.heads), head = task % heads;
    const int value = int(unsigned(block_index()) % BLOCKS) * ROWS, stride = int(heads) * N;  // value: the first row
    const int64_t row = args.places.order[task / heads], begin = args.places.starts[row];
    const int tokens = int(args.places.starts[row + 1] - begin);
    const int64_t origin = begin * stride + head * N;
    const int64_t state = ((row * heads + head) * N + value) * N;
    if (thread == 0) {  // kept here rather than in registers, which are short
        stage.state = state;
        stage.checkpoint = ((args.places.marks[row] * heads + head) * N + value) * N;
    }
    const int mine = tile.slot * R * N + tile.first;  // where this thread's numbers are among the block's

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
            const int64_t at = origin + token * int64_t(stride) + thread + (vector == VALUES ? value : 0);
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
            const Pack<4> four = load<4>(args.begin + state + mine + r * N + c * PARTS);
            for (int e = 0; e < 4; ++e) m[r][c + e] = four[e];
        }
    for (int step = 0; step < STAGE; ++step) put(step, fetch(step));

    const int own = owned<R, LOW, 32>(thread);  // the row, of the R, whose sums this thread writes
    const bool writer = writes<R, LOW, 32>(thread);
    const int out = value + tile.slot * R + own;

    for (int step = 0; step <= tokens; ++step) {
        if (step % STAGE == 0) sync();  // the half to be read is complete, and nobody reads the other any more
        const Ahead ahead = fetch(step + STAGE);
        const float* now = stage.at[step % (2 * STAGE)];
        const Pack<R> u = load<R>(now + VALUES * N + tile.slot * R);
        const float* piece = now + tile.first;
        float y[R], z[R];
        advance<N, true>(m, piece + DECAY * N, piece + A * N, piece + U * N, piece + Y * N, piece + X * N, x, u, y, z);
        float x_own = 0;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            x[r] = sum_over<LOW, 32>(z[r]);
            x_own = r == own ? x[r] : x_own;
        }
        const float sum = scatter_sum<R, LOW, 32>(y);

        const int y_order = REVERSE ? step : step - 1;
        const int64_t y_token = REVERSE ? tokens - 1 - y_order : y_order, x_token = REVERSE ? y_token : step;
        if (writer && y_order >= 0 && y_order < tokens) store(args.y + origin + out + y_token * stride, sum);
        if (writer && args.x && step < tokens) args.x[origin + out + x_token * stride] = x_own;
        const bool edge = REVERSE ? (y_token + 1) % INTERVAL == 0 || step == 0 : step % INTERVAL == 0;
        if (args.checkpoints && edge && step < tokens)
            save(args.checkpoints + stage.checkpoint + x_token / INTERVAL * stride * N + mine);
        put(step + STAGE, ahead);
    }
    save(args.end + stage.state + mine);
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
    float* change;                  // P_t - dlogd_{t+1}, from the first pass for the second
    T *dr, *dw, *dk, *da, *db;
};

// The inputs of one pass, by what they are to `advance`: A, U, Y, X have N numbers for a token, the others one for each
// of the block's columns. first and second are what the two sums are multiplied by afterwards.
template <typename T>
struct Roles {
    const float *A, *X;
    const T *U, *Y, *w, *x, *u, *first, *second;
};

template <int N>
struct ColumnStage {
    static constexpr int KEYS = Tile<N>::SLOTS * Tile<N>::R;
    static constexpr int TOKENS = 2;  // that are read while as many others are filled in
    struct alignas(16) Token {
        float A[N], U[N], Y[N], X[N], d[KEYS], x[KEYS], u[KEYS], first[KEYS], second[KEYS], slope[KEYS];
    } at[2 * TOKENS];
};

// What a block of `columns` works on.
template <int N>
struct ColumnBlock {
    int64_t origin, stride;  // of the interval's first token in the inputs, for value 0; from token to token
    int tokens, key;         // key: the block's first column

    DEVICE ColumnBlock(const Sizes& sizes, const Places& places, int64_t interval, int64_t head, int part) {
        const int64_t row = places.row_of(interval);
        const int64_t begin = places.starts[row] + (interval - places.marks[row]) * INTERVAL;
        const int64_t left = places.starts[row + 1] - begin;
        stride = sizes.heads * N;
        tokens = int(left < INTERVAL ? left : INTERVAL);
        origin = begin * stride + head * N;
        key = part * ColumnStage<N>::KEYS;
    }
};

// One pass over an interval in steps 0 .. tokens, REVERSE or not, as in `rows`. Each step calls sums(step, its place on
// the stage, y, z).
template <int N, bool REVERSE, typename T, typename F>
DEVICE void column_pass(const Roles<T>& in, const ColumnBlock<N>& block, ColumnStage<N>& stage,
                        float (&m)[Tile<N>::R][Tile<N>::PIECE], F&& sums) {
    using Shape = Tile<N>;
    constexpr int R = Shape::R, TOKENS = ColumnStage<N>::TOKENS, KEYS = ColumnStage<N>::KEYS;
    const int thread = thread_index();
    const Shape tile(thread);
    struct Ahead {
        float A, X;
        T U, Y, w, x, u, first, second;
    };
    const auto fetch = [&](int step) {
        const auto one = [&](auto* from, bool late, int width, bool decay = false) {
            using Number = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
            const int order = step - late, token = REVERSE ? block.tokens - 1 - order : order;
            const int64_t at = block.origin + token * block.stride + thread + (width < N ? block.key : 0);
            return order >= 0 && order < block.tokens && thread < width ? from[at] : missing<Number>(decay);
        };
        Ahead ahead = {one(in.A, true, N),        one(in.X, false, N),           one(in.U, !REVERSE, N),
                       one(in.Y, !REVERSE, N),    one(in.w, true, KEYS, true),   one(in.x, true, KEYS),
                       one(in.u, !REVERSE, KEYS), one(in.first, !REVERSE, KEYS), one(in.second, false, KEYS)};
        if (REVERSE && step == 0) ahead.u = missing<T>(false);  // the G of the last token has its share already
        return ahead;
    };
    const auto put = [&](int step, const Ahead& ahead) {
        auto& place = stage.at[step % (2 * TOKENS)];
        if (thread < N) {
            place.A[thread] = ahead.A, place.X[thread] = ahead.X;
            place.U[thread] = widen(ahead.U), place.Y[thread] = widen(ahead.Y);
        }
        if (thread < KEYS) {
            const Decay decay = decay_of(widen(ahead.w));
            place.d[thread] = decay.value, place.slope[thread] = decay.slope;
            place.x[thread] = widen(ahead.x), place.u[thread] = widen(ahead.u);
            place.first[thread] = widen(ahead.first), place.second[thread] = widen(ahead.second);
        }
    };

#pragma unroll 1
    for (int step = 0; step < TOKENS; ++step) put(step, fetch(step));
    for (int step = 0; step <= block.tokens; ++step) {
        if (step % TOKENS == 0) sync();
        const Ahead ahead = fetch(step + TOKENS);
        const auto& now = stage.at[step % (2 * TOKENS)];
        const Pack<R> x = load<R>(now.x + tile.slot * R), u = load<R>(now.u + tile.slot * R);
        float y[R], z[R];
        advance<N, false>(m, now.d + tile.slot * R, now.A + tile.first, now.U + tile.first, now.Y + tile.first,
                          now.X + tile.first, x.at, u, y, z);
        sums(step, now, scatter_sum<R, Shape::LOW, 32>(y), scatter_sum<R, Shape::LOW, 32>(z));
        put(step + TOKENS, ahead);
    }
}

// One block: SLOTS R key columns of one head in one interval.
template <int N, typename T>
__global__ void BOUNDS(Tile<N>::THREADS, REGISTERS) columns(const Columns<T> args) {
    using Shape = Tile<N>;
    using Stage = ColumnStage<N>;
    constexpr int PIECE = Shape::PIECE, PARTS = Shape::PARTS, LOW = Shape::LOW, R = Shape::R;
    constexpr int BLOCKS = N / Stage::KEYS;
    SHARED(Stage, stage);
    const unsigned task = unsigned(block_index()) / BLOCKS, heads = unsigned(args.sizes.heads);
    const int64_t interval = task / heads, head = task % heads;
    const ColumnBlock<N> block(args.sizes, args.places, interval, head, int(unsigned(block_index()) % BLOCKS));
    const Shape tile(thread_index());

    const int own = tile.slot * R + owned<R, LOW, 32>(thread_index());  // the column whose sums this thread has
    const bool writer = writes<R, LOW, 32>(thread_index());
    const int out = block.key + own;
    const int64_t state = ((interval * heads + head) * N + tile.first) * N + block.key + tile.slot * R;
    float m[R][PIECE];  // of S, later of G
#pragma unroll
    for (int c = 0; c < PIECE; ++c) {
        const Pack<R> column = load<R>(args.S + state + (c / 4 * 4 * PARTS + c % 4) * N);
#pragma unroll
        for (int r = 0; r < R; ++r) m[r][c] = column[r];
    }
    column_pass<N, false>(Roles<T>{args.sa, args.dsa, args.v, args.dy, args.w, args.b, args.k, args.r, args.a}, block,
                          stage, m, [&](int step, const auto& now, float dr, float da) {
                              if (!writer) return;
                              const int64_t at = block.origin + out + step * block.stride, before = at - block.stride;
                              if (step < block.tokens) store(args.da + at, da);
                              if (step > 0) store(args.dr + before, dr);
                              if (step > 0) args.change[before] = now.first[own] * dr + now.second[own] * da;
                          });
    float both[R] = {};
#pragma unroll
    for (int c = 0; c < PIECE; ++c) {
        const Pack<R> column = load<R>(args.G + state + (c / 4 * 4 * PARTS + c % 4) * N);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            both[r] += m[r][c] * column[r];
            m[r][c] = column[r];
        }
    }
    float P = scatter_sum<R, LOW, 32>(both), dlogd = 0;
    sync();  // nobody reads the stage of the first pass any more
    column_pass<N, true>(Roles<T>{args.dsa, args.sa, args.dy, args.v, args.w, args.a, args.r, args.k, args.b}, block,
                         stage, m, [&](int step, const auto& now, float dk, float db) {
                             if (!writer) return;
                             const int t = block.tokens - 1 - step;
                             const int64_t at = block.origin + out + t * block.stride;
                             if (step > 0) store(args.dw + at + block.stride, dlogd * now.slope[own]);
                             if (t < 0) return;
                             store(args.dk + at, dk);
                             store(args.db + at, db);
                             dlogd = P - now.first[own] * dk - now.second[own] * db;
                             P = dlogd + (t > 0 ? args.change[at - block.stride] : 0.f);
                         });
}

}  // namespace

RWKV_PUBLIC int64_t rwkv_interval() { return INTERVAL; }

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
               Columns<T>{sizes, places, in(R), in(W), in(K), in(V), in(A), in(B), in(DY), wide(SA), wide(DSA), wide(S),
                          wide(G), wide(CHANGE), out(DR), out(DW), out(DK), out(DA), out(DB)});
    });
    return refused ? refused : here.error();
}

}  // namespace rwkv
