// delta_keys: removal keys of unit length per head, and the keys that replace them.
#pragma once

#include "rows.h"

namespace rwkv {
namespace {

constexpr float NORM_EPS = 1e-12f;  // as F.normalize

// Where a row's next head begins: offset `at` in the activations, `c` in the vectors.
struct Head {
    int64_t at, c;

    Head(int64_t row, int64_t width) : at(row * width), c(0) {}
    void next(int64_t size, int64_t width) {
        at += size;
        c = c + size < width ? c + size : 0;
    }
};

template <typename T>
struct KeyInputs {
    const T *k, *a12;
    const float *k_k, *k_a, *a0;
    int64_t width, size;

    KeyInputs(void* const* x, const RowSizes& sizes)
        : k(tensor<const T>(x, 0)),
          a12(tensor<const T>(x, 4)),
          k_k(tensor<const float>(x, 1)),
          k_a(tensor<const float>(x, 2)),
          a0(tensor<const float>(x, 3)),
          width(sizes.width),
          size(sizes.width / sizes.parts) {}

    // kk = k * k_k of one head before it is normalised; returns max(its length, eps).
    INLINE float scaled_key(const Head& head, float* kk) const {
        vec squares = splat(0);
        each(size, [&](int64_t j, auto lanes) {
            const vec key = load(k + head.at + j, lanes) * load(k_k + head.c + j, lanes);
            store(kk + j, key);
            squares += key * key;
        });
        return std::max(std::sqrt(sum(squares)), NORM_EPS);
    }

    template <typename Lanes>
    INLINE vec rate(const Head& head, int64_t j, Lanes lanes) const {
        return sigmoid(load(a0 + head.c + j, lanes) + load(a12 + head.at + j, lanes));
    }
};

}  // namespace

// k, k_k, k_a, a0, a12 | replaced, -kk, kk a
RWKV_EXPORT rwkv_delta_keys(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        Chunks(sizes.rows).run(threads, sizes.width, [&](int64_t, int64_t begin, int64_t end) {
            const KeyInputs<T> in(x, sizes);
            T *replaced = tensor<T>(x, 5), *minus_kk = tensor<T>(x, 6), *kk_a = tensor<T>(x, 7);
            Buffers buffers(1, in.size);
            float* kk = buffers[0];
            for (Head head(begin, in.width); head.at < end * in.width; head.next(in.size, in.width)) {
                const float inverse = 1.f / in.scaled_key(head, kk);
                each(in.size, [&](int64_t j, auto lanes) {
                    const int64_t at = head.at + j;
                    const vec a = in.rate(head, j, lanes), unit = load(kk + j) * inverse;
                    const vec kept = 1.f + (a - 1.f) * load(in.k_a + head.c + j, lanes);
                    store(replaced + at, load(in.k + at, lanes) * kept, lanes);
                    store(minus_kk + at, -unit, lanes);
                    store(kk_a + at, unit * a, lanes);
                });
            }
        });
    });
}

// the outputs' gradients, k, k_k, k_a, a0, a12 | dk, dk_k, dk_a, da0, da12
RWKV_EXPORT rwkv_delta_keys_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const Chunks chunks(sizes.rows);
        ColumnSums sums(chunks, 3, sizes.width);
        chunks.run(threads, 2 * sizes.width, [&](int64_t chunk, int64_t begin, int64_t end) {
            const T *d0 = tensor<const T>(x, 0), *d1 = tensor<const T>(x, 1), *d2 = tensor<const T>(x, 2);
            const KeyInputs<T> in(x + 3, sizes);
            T *dk = tensor<T>(x, 8), *da12 = tensor<T>(x, 12);
            const int64_t C = in.width;
            Buffers buffers(3, in.size);
            float *kk = buffers[0], *rate = buffers[1], *dkk = buffers[2];
            const ChunkSums totals{sums.begin(chunk), C};
            for (Head head(begin, C); head.at < end * C; head.next(in.size, C)) {
                const float length = in.scaled_key(head, kk), inverse = 1.f / length;
                vec products = splat(0);
                each(in.size, [&](int64_t j, auto lanes) {
                    const vec a = in.rate(head, j, lanes), unit = load(kk + j) * inverse;
                    const vec d = load_if(d2, head.at + j, lanes) * a - load_if(d1, head.at + j, lanes);
                    store(rate + j, a), store(kk + j, unit), store(dkk + j, d);
                    products += d * unit;
                });
                // Normalising removes what dkk has in the direction of kk, but not where the divisor is a constant.
                const float along = length > NORM_EPS ? sum(products) : 0.f;
                each(in.size, [&](int64_t j, auto lanes) {
                    const int64_t at = head.at + j, c = head.c + j;
                    const vec key = load(in.k + at, lanes), d = load_if(d0, at, lanes), k_a = load(in.k_a + c, lanes);
                    const vec a = load(rate + j), unit = load(kk + j);
                    const vec scaled = (load(dkk + j) - unit * along) * inverse;
                    const vec gate = (load_if(d2, at, lanes) * unit + d * key * k_a) * a * (1.f - a);
                    store_if(dk, at, d * (1.f + (a - 1.f) * k_a) + scaled * load(in.k_k + c, lanes), lanes);
                    store_if(da12, at, gate, lanes);
                    totals.add(0, c, scaled * key, lanes);
                    totals.add(1, c, d * key * (a - 1.f), lanes);
                    totals.add(2, c, gate, lanes);
                });
            }
        });
        sums.totals(threads, sizes.width, x + 9);
    });
}

}  // namespace rwkv
