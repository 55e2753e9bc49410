// Products with a matrix on the CPU, y = x W^T without a gradient: what decoding is made of. Every weight is read from
// memory once for all of a few rows, as it is stored: float32, bfloat16, integers of eight bits or one of 16 levels
// with a scale for 64 of them, floats of eight bits with a scale a row. The plain PyTorch twin in ops/products.py
// judges this file.
//
// Letters: R rows of x, O rows of W that are read together, n columns (inputs), W lanes of a register. A sum is made of
// the same terms in the same order for any number of threads and of rows, up to where many rows lie in panels and among
// those. Arithmetic is float32.
#include "products.h"
#include "threads.h"

namespace rwkv {
namespace {

constexpr int64_t WORTH = 1 << 16;  // multiplications from which a second thread pays

// sizes of a call: rows of x, columns, rows of W, whether the rows are many
struct ProductSizes {
    int64_t rows, n, out;
    bool many;
};

template <typename Matrix, typename T>
void product(const Matrix& matrix, const float* x, T* y, const ProductSizes& sizes, int threads) {
    const int64_t rows = sizes.rows, out = sizes.out, tasks = product_tasks<Matrix>(rows, out, sizes.many);
    if (rows * sizes.n * out <= WORTH) threads = 1;
    std::unique_ptr<float[]> laid_out;
    if (sizes.many || Matrix::UNIT > 1) {
        const int64_t height = laid_out_rows<Matrix>(sizes.many), parts = (rows + height - 1) / height;
        laid_out.reset(new float[parts * laid_out_size<Matrix>(sizes.n, sizes.many)]);
        for_tasks<Nothing>(threads, parts, [&](int64_t part, Nothing&) {
            lay_out<Matrix>(x, rows, sizes.n, sizes.many, part, laid_out.get());
        });
        x = laid_out.get();
    }
    const auto put = [&](int64_t row, int64_t o, float value) { narrow(value, y[row * out + o]); };
    on_team(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int thread, int team) {
        for (int64_t task = tasks * thread / team; task < tasks * (thread + 1) / team; ++task)
            product_task(matrix, x, rows, out, sizes.many, task, put);
    });
}

}  // namespace

// x (rows, n) float32, weight (out, n) as `stored`, scales and levels or null | y (rows, out) of the call's dtype
RWKV_EXPORT rwkv_product(void* const* x, const int64_t* numbers, int dtype, int threads, int stored) {
    const ProductSizes sizes{numbers[0], numbers[1], numbers[2], numbers[3] != 0};
    const float* rows = tensor<const float>(x, 0);
    const float *scales = tensor<const float>(x, 2), *levels = tensor<const float>(x, 3);
    if (stored > STORED_BFLOAT16 && sizes.n % BLOCK) return "blocks of 64 weights do not fill the rows of the matrix";
    return by_dtype(dtype, [&](auto element) {
        auto* y = tensor<decltype(element)>(x, 4);
        with_matrix(stored, x[1], scales, levels, sizes.n,
                    [&](const auto& matrix) { product(matrix, rows, y, sizes, threads); });
    });
}

}  // namespace rwkv
