// Products of a few rows with a matrix on the CPU, y = x W^T: what decoding is made of. Every weight is read from
// memory once for all rows, as it is stored: float32, bfloat16, or eight-bit integers with a scale for 64 of them. The
// plain PyTorch twin in ops/products.py judges this file.
//
// Letters: R rows of x, O rows of W that are read together, n columns (inputs), W lanes of a register. A sum is made of
// the same terms in the same order for any number of threads and of rows. Arithmetic is float32.
#include "simd.h"
#include "threads.h"

namespace rwkv {
namespace {

constexpr int BLOCK = 64;           // integers of one scale
constexpr int64_t WORTH = 1 << 16;  // multiplications from which a second thread pays

typedef int8_t bytes __attribute__((vector_size(W)));

INLINE vec load(const int8_t* p) {
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
            for (int r = 0; r < R; ++r) rows[r] = rwkv::load(x + r * n + i, lanes);
            for (int o = 0; o < O; ++o) {
                const vec weight = rwkv::load(w + o * n + i, lanes);
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
                for (int r = 0; r < R; ++r) rows[r] = rwkv::load(x + r * n + i + j);
                for (int o = 0; o < O; ++o) {
                    const vec weight = load(w + o * n + i + j);
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

// sizes of a call: rows of x, columns, rows of W
struct ProductSizes {
    int64_t rows, n, out;
};

template <int R, typename Matrix, typename T>
void some_rows(const Matrix& matrix, const float* x, T* y, int64_t out, int64_t begin, int64_t end) {
    constexpr int O = R == 1 ? 4 : 2;  // as many sums as there are registers for
    int64_t first = begin;
    for (; first + O <= end; first += O) {
        float found[O][R];
        matrix.template times<O, R>(first, x, found);
        for (int o = 0; o < O; ++o)
            for (int r = 0; r < R; ++r) narrow(found[o][r], y[r * out + first + o]);
    }
    for (; first < end; ++first) {
        float found[1][R];
        matrix.template times<1, R>(first, x, found);
        for (int r = 0; r < R; ++r) narrow(found[0][r], y[r * out + first]);
    }
}

// All rows of x with a few rows of W at a time, which stay in the cache meanwhile.
template <typename Matrix, typename T>
void product(const Matrix& matrix, const float* x, T* y, const ProductSizes& sizes, int threads) {
    constexpr int64_t TILE = 16;  // rows of W
    const int64_t tiles = (sizes.out + TILE - 1) / TILE;
    const bool large = sizes.rows * sizes.n * sizes.out > WORTH;
    on_team(large ? static_cast<int>(std::min<int64_t>(threads, tiles)) : 1, [&](int thread, int team) {
        for (int64_t tile = tiles * thread / team; tile < tiles * (thread + 1) / team; ++tile) {
            const int64_t begin = tile * TILE, end = std::min(sizes.out, begin + TILE);
            int64_t row = 0;
            for (; row + 4 <= sizes.rows; row += 4)
                some_rows<4>(matrix, x + row * sizes.n, y + row * sizes.out, sizes.out, begin, end);
            for (; row + 2 <= sizes.rows; row += 2)
                some_rows<2>(matrix, x + row * sizes.n, y + row * sizes.out, sizes.out, begin, end);
            if (row < sizes.rows) some_rows<1>(matrix, x + row * sizes.n, y + row * sizes.out, sizes.out, begin, end);
        }
    });
}

}  // namespace

// x (rows, n) float32, weight (out, n) of `stored`, scales (out, n / 64) or null | y (rows, out) of the call's dtype
RWKV_EXPORT rwkv_product(void* const* x, const int64_t* numbers, int dtype, int threads, int stored) {
    const ProductSizes sizes{numbers[0], numbers[1], numbers[2]};
    const float* rows = tensor<const float>(x, 0);
    const float* scales = tensor<const float>(x, 2);
    if (scales && sizes.n % BLOCK) return "blocks of 64 integers do not fill the rows of the matrix";
    return by_dtype(dtype, [&](auto element) {
        auto* y = tensor<decltype(element)>(x, 3);
        const auto run = [&](const auto& matrix) { product(matrix, rows, y, sizes, threads); };
        if (scales)
            run(Int8{tensor<const int8_t>(x, 1), scales, sizes.n});
        else if (stored == BFLOAT16)
            run(Dense<bf16>{tensor<const bf16>(x, 1), sizes.n});
        else
            run(Dense<float>{tensor<const float>(x, 1), sizes.n});
    });
}

}  // namespace rwkv
