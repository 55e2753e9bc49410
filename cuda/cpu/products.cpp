// Products of a few rows with a matrix on the CPU, y = x W^T: what decoding is made of. Every weight is read from
// memory once for all rows, as it is stored: float32, bfloat16, or eight-bit integers with a scale for 64 of them. The
// plain PyTorch twin in ops/products.py judges this file.
//
// Letters: R rows of x, O rows of W that are read together, n columns (inputs), W lanes of a register. A sum is made of
// the same terms in the same order for any number of threads and of rows. Arithmetic is float32.
#include "products.h"
#include "threads.h"

namespace rwkv {
namespace {

constexpr int64_t WORTH = 1 << 16;  // multiplications from which a second thread pays

// sizes of a call: rows of x, columns, rows of W
struct ProductSizes {
    int64_t rows, n, out;
};

template <typename Matrix, typename T>
void product(const Matrix& matrix, const float* x, T* y, const ProductSizes& sizes, int threads) {
    const int64_t tiles = (sizes.out + TILE - 1) / TILE;
    const bool large = sizes.rows * sizes.n * sizes.out > WORTH;
    const auto put = [&](int64_t row, int64_t o, float value) { narrow(value, y[row * sizes.out + o]); };
    on_team(large ? static_cast<int>(std::min<int64_t>(threads, tiles)) : 1, [&](int thread, int team) {
        for (int64_t tile = tiles * thread / team; tile < tiles * (thread + 1) / team; ++tile)
            product_tile(matrix, x, sizes.rows, sizes.out, tile, put);
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
