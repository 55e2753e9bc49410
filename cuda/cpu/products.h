// Rows of x times rows of W: the loops that products.cpp and decode.cpp share. Letters as in products.cpp.
#pragma once

#include <algorithm>

#include "simd.h"

namespace rwkv {
namespace {

constexpr int BLOCK = 64;     // integers of one scale
constexpr int64_t TILE = 16;  // rows of W that stay in the cache for all rows of x

typedef int8_t bytes __attribute__((vector_size(W)));

INLINE vec load_integers(const int8_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
    typedef char letters __attribute__((vector_size(16)));
    typedef long long pair __attribute__((vector_size(16)));
    long long x;
    std::memcpy(&x, p, W);
    // one instruction, of which GCC makes eight
    return __builtin_convertvector(bit_copy<ivec>(__builtin_ia32_pmovsxbd256(bit_copy<letters>(pair{x, 0}))), vec);
#else
    bytes x;
    std::memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(__builtin_convertvector(x, ivec), vec);
#endif
}

// A matrix of plain numbers.
template <typename T>
struct Dense {
    const T* values;
    int64_t n;

    // y[o][r] = row `first + o` of W times row r of x
    template <int O, int R>
    void times(int64_t first, const float* x, float (&y)[O][R]) const {
        const T* w = values + first * n;
        vec sums[O][R];
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) sums[o][r] = splat(0);
        each(n, [&](int64_t i, auto lanes) {
            vec rows[R];
            for (int r = 0; r < R; ++r) rows[r] = load(x + r * n + i, lanes);
            for (int o = 0; o < O; ++o) {
                const vec weight = load(w + o * n + i, lanes);
                __builtin_prefetch(w + (o + O) * n + i);  // the rows that come next
                for (int r = 0; r < R; ++r) sums[o][r] += weight * rows[r];
            }
        });
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) y[o][r] = sum(sums[o][r]);
    }
};

// Blocks of 64 integers along a row, each with a scale.
struct Int8 {
    const int8_t* values;
    const float* scales;
    int64_t n;  // a multiple of 64

    template <int O, int R>
    void times(int64_t first, const float* x, float (&y)[O][R]) const {
        const int8_t* w = values + first * n;
        const float* scale = scales + first * (n / BLOCK);
        vec sums[O][R];
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) sums[o][r] = splat(0);
        for (int64_t i = 0; i < n; i += BLOCK) {
            vec parts[O][R];
            for (int o = 0; o < O; ++o)
                for (int r = 0; r < R; ++r) parts[o][r] = splat(0);
#pragma GCC unroll 8
            for (int j = 0; j < BLOCK; j += W) {
                vec rows[R];
                for (int r = 0; r < R; ++r) rows[r] = load(x + r * n + i + j);
                for (int o = 0; o < O; ++o) {
                    const vec weight = load_integers(w + o * n + i + j);
                    if (j == 0) __builtin_prefetch(w + (o + O) * n + i);
                    for (int r = 0; r < R; ++r) parts[o][r] += weight * rows[r];
                }
            }
            for (int o = 0; o < O; ++o)
                for (int r = 0; r < R; ++r) sums[o][r] += scale[o * (n / BLOCK) + i / BLOCK] * parts[o][r];
        }
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) y[o][r] = sum(sums[o][r]);
    }
};

// put(row of x, row of W, their product) for R rows of x and the rows [begin, end) of W.
template <int R, typename Matrix, typename Put>
void some_rows(const Matrix& matrix, const float* x, int64_t row, int64_t begin, int64_t end, const Put& put) {
    constexpr int O = R == 1 ? 4 : 2;  // as many sums as there are registers for
    x += row * matrix.n;
    int64_t first = begin;
    for (; first + O <= end; first += O) {
        float found[O][R];
        matrix.template times<O, R>(first, x, found);
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) put(row + r, first + o, found[o][r]);
    }
    for (; first < end; ++first) {
        float found[1][R];
        matrix.template times<1, R>(first, x, found);
        for (int r = 0; r < R; ++r) put(row + r, first, found[0][r]);
    }
}

// The same for all `rows` of x and one tile of the `out` rows of W.
template <typename Matrix, typename Put>
void product_tile(const Matrix& matrix, const float* x, int64_t rows, int64_t out, int64_t tile, const Put& put) {
    const int64_t begin = tile * TILE, end = std::min(out, begin + TILE);
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) some_rows<4>(matrix, x, row, begin, end, put);
    for (; row + 2 <= rows; row += 2) some_rows<2>(matrix, x, row, begin, end, put);
    if (row < rows) some_rows<1>(matrix, x, row, begin, end, put);
}

// Products of more rows: PANEL rows of x lie beside each other, so that a register holds one column of several rows and
// a weight meets all of them. Weights are widened a block at a time, for all rows.
constexpr int PANEL = 2 * W;   // rows of x
constexpr int64_t MOST = 128;  // rows of x that one tile takes, a multiple of PANEL
constexpr int64_t TALL = 24;   // rows of W of a tile, a multiple of GROUP
constexpr int64_t DEEP = 256;  // columns that are summed by themselves; a multiple of 64
constexpr int GROUP = 6;       // rows of W whose sums fill the registers

inline int64_t panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// to[panel][column][row of the panel] = x[row][column] of one panel; zeros where there are no more rows
inline void fill_panel(const float* x, int64_t rows, int64_t n, int64_t panel, float* to) {
    to += panel * n * PANEL;
    for (int r = 0; r < PANEL; ++r) {
        const int64_t row = panel * PANEL + r;
        for (int64_t i = 0; i < n; ++i) to[i * PANEL + r] = row < rows ? x[row * n + i] : 0.f;
    }
}

// y[o][0 .. PANEL) += sum_i w[o][i] x[i][0 .. PANEL) for O rows of w, `stride` apart
template <int O>
INLINE void panel_product(const float* w, int64_t stride, const float* x, int64_t n, float* y) {
    vec sums[O][2] = {};
    for (int64_t i = 0; i < n; ++i) {
        const vec low = load(x + i * PANEL), high = load(x + i * PANEL + W);
        for (int o = 0; o < O; ++o) {
            const vec weight = splat(w[o * stride + i]);
            sums[o][0] += weight * low;
            sums[o][1] += weight * high;
        }
    }
    for (int o = 0; o < O; ++o)
        for (int half = 0; half < 2; ++half) {
            float* to = y + o * MOST + half * W;
            store(to, load(to) + sums[o][half]);
        }
}

// Columns [begin, begin + n) of rows of W, widened where they are not float32; `stride` is that of what comes back.
INLINE const float* widened(const Dense<float>& matrix, int64_t first, int64_t, int64_t begin, int64_t, float*,
                            int64_t& stride) {
    stride = matrix.n;
    return matrix.values + first * matrix.n + begin;
}

INLINE const float* widened(const Dense<bf16>& matrix, int64_t first, int64_t rows, int64_t begin, int64_t n, float* to,
                            int64_t& stride) {
    for (int64_t o = 0; o < rows; ++o)
        each(n, [&](int64_t i, auto lanes) {
            store(to + o * DEEP + i, load(matrix.values + (first + o) * matrix.n + begin + i, lanes), lanes);
        });
    stride = DEEP;
    return to;
}

INLINE const float* widened(const Int8& matrix, int64_t first, int64_t rows, int64_t begin, int64_t n, float* to,
                            int64_t& stride) {
    for (int64_t o = 0; o < rows; ++o)
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t at = (first + o) * matrix.n + begin + i;
            const float scale = matrix.scales[at / BLOCK];
            for (int j = 0; j < BLOCK; j += W)
                store(to + o * DEEP + i + j, scale * load_integers(matrix.values + at + j));
        }
    stride = DEEP;
    return to;
}

// put(row of x, row of W, their product) for at most MOST rows of x, in panels, from row `row` on (a multiple of
// PANEL), and for the rows [begin, end) of W, at most TALL.
template <typename Matrix, typename Put>
void panels_tile(const Matrix& matrix, const float* x, int64_t row, int64_t rows, int64_t begin, int64_t end,
                 const Put& put) {
    alignas(64) float y[TALL * MOST] = {}, wide[TALL * DEEP];
    const int64_t n = matrix.n, tall = end - begin;
    for (int64_t first = 0; first < n; first += DEEP) {
        const int64_t deep = std::min(DEEP, n - first);
        int64_t stride;
        const float* w = widened(matrix, begin, tall, first, deep, wide, stride);
        for (int64_t panel = 0; panel < panels(rows); ++panel) {
            const float* columns = x + ((row / PANEL + panel) * n + first) * PANEL;
            float* to = y + panel * PANEL;
            int64_t o = 0;
            for (; o + GROUP <= tall; o += GROUP)
                panel_product<GROUP>(w + o * stride, stride, columns, deep, to + o * MOST);
            for (; o < tall; ++o) panel_product<1>(w + o * stride, stride, columns, deep, to + o * MOST);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < tall; ++o) put(row + r, begin + o, y[o * MOST + r]);
}

}  // namespace
}  // namespace rwkv
