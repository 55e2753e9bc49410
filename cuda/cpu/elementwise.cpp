// Element-wise groups of RWKV-7 on the CPU, forward and backward each in one pass over the rows. The mathematics and
// the shapes are stated in ops/elementwise_naive.py, the twin that judges these. Activations are float32 or bfloat16,
// small vectors float32, arithmetic float32. Only inputs are saved: the backward passes compute the rest again.
//
// Letters: rows = B * T, C width, N head size; a leading d marks a gradient.
//
// All functions have the arguments (tensors, sizes, dtype, threads) of call.h, gated_norm's a last one, eps.
//     forward: inputs | outputs
//     backward: gradients of the outputs (null: zero), inputs | gradients of the inputs (null: nobody wants it)
#include "elementwise_keys.h"
#include "elementwise_mix.h"
#include "elementwise_norm.h"

namespace rwkv {
namespace {

constexpr int64_t BLOCK = 2048;  // elements that count as one row

// to[i] = f(i, Whole or Part) for n elements of a type
template <typename T, typename F>
void for_elements(int threads, int64_t n, T* to, const F& f) {
    Chunks((n + BLOCK - 1) / BLOCK).run(threads, BLOCK, [&](int64_t, int64_t begin, int64_t end) {
        const auto inner = f;  // with the pointers that it holds, see `store`
        T* out = to + begin * BLOCK;
        each(std::min(n, end * BLOCK) - begin * BLOCK,
             [&](int64_t i, auto lanes) { store(out + i, inner(begin * BLOCK + i, lanes), lanes); });
    });
}

}  // namespace

// v, v_first, v0, v12 | out
RWKV_EXPORT rwkv_value_gate(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        Chunks(sizes.rows).run(threads, sizes.width, [&](int64_t, int64_t begin, int64_t end) {
            const T *v = tensor<const T>(x, 0), *v_first = tensor<const T>(x, 1), *v12 = tensor<const T>(x, 3);
            const float* v0 = tensor<const float>(x, 2);
            T* out = tensor<T>(x, 4);
            const int64_t C = sizes.width;
            for (int64_t row = begin * C; row < end * C; row += C)
                each(C, [&](int64_t c, auto lanes) {
                    const int64_t at = row + c;
                    const vec value = load(v + at, lanes), gate = load(v0 + c, lanes) + load(v12 + at, lanes);
                    store(out + at, value + (load(v_first + at, lanes) - value) * sigmoid(gate), lanes);
                });
        });
    });
}

// dout, v, v_first, v0, v12 | dv, dv_first, dv0, dv12
RWKV_EXPORT rwkv_value_gate_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const Chunks chunks(sizes.rows);
        ColumnSums sums(chunks, 1, sizes.width);
        chunks.run(threads, sizes.width, [&](int64_t chunk, int64_t begin, int64_t end) {
            const T *dout = tensor<const T>(x, 0), *v = tensor<const T>(x, 1), *v_first = tensor<const T>(x, 2);
            const T* v12 = tensor<const T>(x, 4);
            const float* v0 = tensor<const float>(x, 3);
            T *dv = tensor<T>(x, 5), *dv_first = tensor<T>(x, 6), *dv12 = tensor<T>(x, 8);
            float* dgate = sums.begin(chunk);
            const int64_t C = sizes.width;
            for (int64_t row = begin * C; row < end * C; row += C)
                each(C, [&](int64_t c, auto lanes) {
                    const int64_t at = row + c;
                    const vec d = load_if(dout, at, lanes);
                    const vec s = sigmoid(load(v0 + c, lanes) + load(v12 + at, lanes)), through = d * s;
                    const vec gate = through * (1.f - s) * (load(v_first + at, lanes) - load(v + at, lanes));
                    store_if(dv, at, d - through, lanes);
                    store_if(dv_first, at, through, lanes);
                    store_if(dv12, at, gate, lanes);
                    store(dgate + c, load(dgate + c, lanes) + gate, lanes);
                });
        });
        sums.totals(threads, sizes.width, x + 7);
    });
}

// x | out
RWKV_EXPORT rwkv_relu_squared(void* const* x, const int64_t* numbers, int dtype, int threads) {
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const T* from = tensor<const T>(x, 0);
        for_elements(threads, row_sizes(numbers).rows, tensor<T>(x, 1), [from](int64_t i, auto lanes) {
            const vec value = load(from + i, lanes), positive = value < 0.f ? splat(0) : value;
            return positive * positive;
        });
    });
}

// dout, out | dx, from the output, which the next matrix product keeps anyway: d(x^2)/dx = 2 x = 2 sqrt(output)
RWKV_EXPORT rwkv_relu_squared_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const T *dout = tensor<const T>(x, 0), *out = tensor<const T>(x, 1);
        for_elements(threads, row_sizes(numbers).rows, tensor<T>(x, 2), [dout, out](int64_t i, auto lanes) {
            return 2.f * load(dout + i, lanes) * sqrt(load(out + i, lanes));
        });
    });
}

}  // namespace rwkv
