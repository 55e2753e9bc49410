// Rows of x times rows of W: the loops that products.cpp and decode.cpp share. Letters as in products.cpp.
#pragma once

#include <algorithm>

#include "product_formats.h"
#include "product_tiles.h"

namespace rwkv {
namespace {

constexpr int64_t TILE = 16;  // rows of W that stay in the cache for all rows of x
constexpr int TOGETHER = 4;   // rows of x whose sums fill the registers, with SIDE rows of W
constexpr int SIDE = W == 16 ? 4 : 2;
constexpr int SIDE_OF_ONE = 4;  // rows of W beside one row of x

// y[o * R + r] = row `first + o` of W times row r of x, for O rows of W, of which there are `count`, and R rows of x,
// of which there are `rows`; what goes beyond them is nothing.
template <int O, int R, typename Matrix>
__attribute__((noinline)) void times(const Matrix& of, int64_t first, int64_t count, const float* x, int64_t rows,
                                     float* y) {
    const Matrix matrix = of;
    constexpr bool blockwise = Matrix::SCALES == BLOCK_SCALES;
    const int64_t n = matrix.n;
    int64_t own[O];
    const float* inputs[R];
    for (int o = 0; o < O; ++o) own[o] = first + std::min<int64_t>(o, count - 1);
    for (int r = 0; r < R; ++r) inputs[r] = x + std::min<int64_t>(r, rows - 1) * n;
    vec sums[O * R] = {};
    int64_t i = 0;
    for (; i + Matrix::WIDTH <= n; i += Matrix::WIDTH) {
        typename Matrix::Columns columns[O];
        vec parts[O * R] = {};  // sums of a block before its scale
        for (int o = 0; o < O; ++o) {
            columns[o] = matrix.block(own[o], i);
            __builtin_prefetch(matrix.place(own[o] + O, i));  // the rows that come next
        }
#pragma GCC unroll 8
        for (int j = 0; j < Matrix::WIDTH / W; ++j) {
            vec part[R];
            for (int r = 0; r < R; ++r) part[r] = load(inputs[r] + i + j * W);
            for (int o = 0; o < O; ++o) {
                vec weight;
                if constexpr (Matrix::SCALES == NO_SCALES)
                    weight = columns[o].get(j);
                else
                    weight = columns[o].raw(j);
                for (int r = 0; r < R; ++r) (blockwise ? parts : sums)[o * R + r] += weight * part[r];
            }
        }
        if constexpr (blockwise)
            for (int o = 0; o < O; ++o)
                for (int r = 0; r < R; ++r) sums[o * R + r] += matrix.scale(own[o], i) * parts[o * R + r];
    }
    if constexpr (Matrix::SCALES == ROW_SCALES)
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) sums[o * R + r] *= matrix.scale(own[o], 0);
    if constexpr (Matrix::WIDTH < BLOCK)
        each(n - i, [&](int64_t j, auto lanes) {
            for (int o = 0; o < O; ++o) {
                const vec weight = matrix.rest(own[o], i + j, lanes);
                for (int r = 0; r < R; ++r) sums[o * R + r] += weight * load(inputs[r] + i + j, lanes);
            }
        });
    if constexpr (O * R % W == 0) {
        for (int at = 0; at < O * R; at += W) store(y + at, row_sums(sums + at));
    } else {
        for (int at = 0; at < O * R; ++at) y[at] = sum(sums[at]);
    }
}

// put(row of x, row of W, their product) for at most R rows of x and the rows [begin, end) of W.
template <int O, int R, typename Matrix, typename Put>
void some_rows(const Matrix& matrix, const float* x, int64_t row, int64_t rows, int64_t begin, int64_t end,
               const Put& put) {
    for (int64_t first = begin; first < end; first += O) {
        float found[O * R];
        const int64_t count = std::min<int64_t>(O, end - first);
        times<O, R>(matrix, first, count, x + row * matrix.n, rows, found);
        for (int o = 0; o < count; ++o)
            for (int r = 0; r < rows; ++r) put(row + r, first + o, found[o * R + r]);
    }
}

// The same for all `rows` of x, their columns in the order of `column`.
template <typename Matrix, typename Put>
void product_tile(const Matrix& matrix, const float* x, int64_t rows, int64_t begin, int64_t end, const Put& put) {
    for (int64_t row = 0; row < rows; row += TOGETHER)
        if (rows - row == 1)
            some_rows<SIDE_OF_ONE, 1>(matrix, x, row, 1, begin, end, put);
        else
            some_rows<SIDE, TOGETHER>(matrix, x, row, std::min<int64_t>(TOGETHER, rows - row), begin, end, put);
}

// Products of more rows: PANEL rows of x lie beside each other, so that a register holds one column of several rows and
// a weight meets all of them. Weights are widened a block at a time, for all rows.
constexpr int64_t PANEL = 2 * W;  // rows of x, of which MOST is a multiple
constexpr int64_t TALL = 24;      // rows of W of a tile, a multiple of GROUP
constexpr int64_t DEEP = 256;     // columns that are summed by themselves; a multiple of 64
constexpr int GROUP = 6;          // rows of W whose sums fill the registers

inline int64_t panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// Whether products of many rows with such a matrix are made of tiles.
#if defined(__AMX_BF16__)
template <typename Matrix>
constexpr bool TILED = std::is_same_v<Matrix, BFloat16> || std::is_same_v<Matrix, Int8> || std::is_same_v<Matrix, Fp8>;
#else
template <typename Matrix>
constexpr bool TILED = false;
#endif

// Rows of x that are laid out together, and the numbers of 32 bits that they then take.
template <typename Matrix>
int64_t laid_out_rows(bool many) {
    return !many ? 1 : TILED<Matrix> ? STRIP : PANEL;
}

template <typename Matrix>
int64_t laid_out_size(int64_t n, bool many) {
#if defined(__AMX_BF16__)
    if (TILED<Matrix> && many) return strip_size(n) / 2;
#endif
    return many ? n * PANEL : n;
}

// Part `part` of them. Few rows: one with its columns in the order of `column`. Many: a strip of tiles, or a panel,
// [column][row of the panel], zeros where there are no more rows.
template <typename Matrix>
void lay_out(const float* x, int64_t rows, int64_t n, bool many, int64_t part, float* to) {
    const int64_t height = laid_out_rows<Matrix>(many), count = std::min(height, rows - part * height);
    x += part * height * n;
    to += part * laid_out_size<Matrix>(n, many);
#if defined(__AMX_BF16__)
    if (TILED<Matrix> && many) return lay_out_strip(x, count, n, reinterpret_cast<uint16_t*>(to));
#endif
    for (int64_t r = 0; r < height; ++r)
        for (int64_t i = 0; i < n; ++i) to[i * height + r] = r < count ? x[r * n + column<Matrix::UNIT>(i, n)] : 0.f;
}

// y[o][0 .. PANEL) += sum_i w[o][i] x[i][0 .. PANEL) for O rows of w, `stride` apart
template <int O>
__attribute__((noinline)) void panel_product(const float* w, int64_t stride, const float* x, int64_t n, float* y) {
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

// Columns [begin, begin + n) of rows of W in the order of `column`, as float32; `stride` is that of what comes back.
INLINE const float* widened(const Float32& matrix, int64_t first, int64_t, int64_t begin, int64_t, float*,
                            int64_t& stride) {
    stride = matrix.n;
    return matrix.values + first * matrix.n + begin;
}

template <typename Matrix>
const float* widened(const Matrix& matrix, int64_t first, int64_t rows, int64_t begin, int64_t n, float* to,
                     int64_t& stride) {
    stride = DEEP;
    for (int64_t o = 0; o < rows; ++o) {
        int64_t i = 0;
        for (; i + Matrix::WIDTH <= n; i += Matrix::WIDTH) {
            const auto columns = matrix.block(first + o, begin + i);
#pragma GCC unroll 8
            for (int j = 0; j < Matrix::WIDTH / W; ++j) store(to + o * DEEP + i + j * W, columns.get(j));
        }
        if constexpr (Matrix::WIDTH < BLOCK)
            each(n - i, [&](int64_t j, auto lanes) {
                store(to + o * DEEP + i + j, matrix.rest(first + o, begin + i + j, lanes), lanes);
            });
    }
    return to;
}

// y[o][r] = row `begin + o` of W, which ends before `end` and within TALL, times row `row + r` of x, which lies in
// panels; `row` is a multiple of PANEL, `rows` at most MOST.
template <typename Matrix>
__attribute__((noinline)) void panels_tile(const Matrix& matrix, const float* x, int64_t row, int64_t rows,
                                           int64_t begin, int64_t end, float* y) {
    alignas(64) float wide[TALL * DEEP];
    const int64_t n = matrix.n, tall = end - begin;
    std::fill(y, y + tall * MOST, 0.f);
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
}

// Rows of W of one task: as many as stay in the cache, or blocks of tiles.
template <typename Matrix>
int64_t task_height(bool many) {
#if defined(__AMX_BF16__)
    if (TILED<Matrix> && many) return TILED_TALL;
#endif
    return many ? TALL : TILE;
}

// A product in tasks that need nothing of each other. `many`: more rows than are few.
template <typename Matrix>
int64_t product_tasks(int64_t rows, int64_t out, bool many) {
    const int64_t height = task_height<Matrix>(many);
    return (out + height - 1) / height * (many ? (rows + MOST - 1) / MOST : 1);
}

// y[o * MOST + r] = row o of W, from `begin` on, times row `row + r` of x, for the task that these make; `row` is a
// multiple of MOST.
template <typename Matrix>
void many_rows(const Matrix& matrix, const float* x, int64_t row, int64_t rows, int64_t begin, int64_t end, float* y) {
#if defined(__AMX_BF16__)
    if constexpr (TILED<Matrix>) {
        const TileShapes shapes;
        const auto* strips = reinterpret_cast<const uint16_t*>(x) + row / STRIP * strip_size(matrix.n);
        return block_product(matrix, strips, (rows + STRIP - 1) / STRIP, begin, end - begin, y);
    }
#endif
    panels_tile(matrix, x, row, rows, begin, end, y);
}

// put(row of x, row of W, their product) for one task; x as `lay_out` leaves it
template <typename Matrix, typename Put>
void product_task(const Matrix& matrix, const float* x, int64_t rows, int64_t out, bool many, int64_t task,
                  const Put& put) {
    const int64_t height = task_height<Matrix>(many), chunks = many ? (rows + MOST - 1) / MOST : 1;
    const int64_t row = task % chunks * MOST, begin = task / chunks * height, end = std::min(out, begin + height);
    if (!many) return product_tile(matrix, x, rows, begin, end, put);
    alignas(64) float y[std::max(TALL, TILED_TALL) * MOST];
    const int64_t count = std::min(MOST, rows - row);
    many_rows(matrix, x, row, count, begin, end, y);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t o = begin; o < end; ++o) put(row + r, o, y[(o - begin) * MOST + r]);
}

}  // namespace
}  // namespace rwkv
