// gated_norm: normalisation per head, the bonus of the current token, and the gate.
#pragma once

#include "elementwise_keys.h"

namespace rwkv {
namespace {

template <typename T>
struct NormInputs {
    const T *y, *r, *k, *v, *g;
    const float *r_k, *weight, *bias;
    float eps;
    int64_t width, size;

    NormInputs(void* const* x, const RowSizes& sizes, float eps_)
        : y(tensor<const T>(x, 0)),
          r(tensor<const T>(x, 1)),
          k(tensor<const T>(x, 2)),
          v(tensor<const T>(x, 3)),
          g(tensor<const T>(x, 7)),
          r_k(tensor<const float>(x, 4)),
          weight(tensor<const float>(x, 5)),
          bias(tensor<const float>(x, 6)),
          eps(eps_),
          width(sizes.width),
          size(sizes.width / sizes.parts) {}

    struct Moments {
        float inverse, bonus;
    };

    // standard[j] = (y - mean) / sqrt(var + eps), zeros after the head's last; bonus = sum r k r_k
    INLINE Moments standardise(const Head& head, float* standard) const {
        vec total = splat(0), products = splat(0), squares = splat(0);
        each(size, [&](int64_t j, auto lanes) {
            const int64_t at = head.at + j;
            const vec value = load(y + at, lanes);
            store(standard + j, value);
            total += value;
            products += load(r + at, lanes) * load(k + at, lanes) * load(r_k + head.c + j, lanes);
        });
        const float mean = sum(total) / static_cast<float>(size);
        each(size, [&](int64_t j, auto lanes) {
            const vec centred = zeros_after(load(standard + j) - mean, lanes);
            store(standard + j, centred);
            squares += centred * centred;
        });
        const float inverse = 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
        each(size, [&](int64_t j, auto) { store(standard + j, load(standard + j) * inverse); });
        return {inverse, sum(products)};
    }
};

}  // namespace

// y, r, k, v, r_k, weight, bias, g | out
RWKV_EXPORT rwkv_gated_norm(void* const* x, const int64_t* numbers, int dtype, int threads, float eps) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        Chunks(sizes.rows).run(threads, sizes.width, [&](int64_t, int64_t begin, int64_t end) {
            const NormInputs<T> in(x, sizes, eps);
            T* out = tensor<T>(x, 8);
            Buffers buffers(1, in.size);
            float* standard = buffers[0];
            for (Head head(begin, in.width); head.at < end * in.width; head.next(in.size, in.width)) {
                const float bonus = in.standardise(head, standard).bonus;
                each(in.size, [&](int64_t j, auto lanes) {
                    const int64_t at = head.at + j, c = head.c + j;
                    const vec normed = load(standard + j) * load(in.weight + c, lanes) + load(in.bias + c, lanes);
                    store(out + at, (normed + bonus * load(in.v + at, lanes)) * load(in.g + at, lanes), lanes);
                });
            }
        });
    });
}

// dout, y, r, k, v, r_k, weight, bias, g | dy, dr, dk, dv, dr_k, dweight, dbias, dg
RWKV_EXPORT rwkv_gated_norm_backward(void* const* x, const int64_t* numbers, int dtype, int threads, float eps) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const Chunks chunks(sizes.rows);
        ColumnSums sums(chunks, 3, sizes.width);
        chunks.run(threads, 2 * sizes.width, [&](int64_t chunk, int64_t begin, int64_t end) {
            const T* dout = tensor<const T>(x, 0);
            const NormInputs<T> in(x + 1, sizes, eps);
            T *dy = tensor<T>(x, 9), *dr = tensor<T>(x, 10), *dk = tensor<T>(x, 11), *dv = tensor<T>(x, 12);
            T* dg = tensor<T>(x, 16);
            const int64_t C = in.width;
            const float share = 1.f / static_cast<float>(in.size);
            Buffers buffers(2, in.size);
            float *standard = buffers[0], *dstandard = buffers[1];
            const ChunkSums totals{sums.begin(chunk), C};
            for (Head head(begin, C); head.at < end * C; head.next(in.size, C)) {
                const auto [inverse, bonus] = in.standardise(head, standard);
                vec dbonuses = splat(0), total = splat(0), products = splat(0);
                each(in.size, [&](int64_t j, auto lanes) {
                    const int64_t at = head.at + j, c = head.c + j;
                    const vec d = load_if(dout, at, lanes), inner = d * load(in.g + at, lanes);
                    const vec value = load(in.v + at, lanes), weight = load(in.weight + c, lanes);
                    const vec normed = load(standard + j), through = inner * weight;
                    store_if(dg, at, d * (normed * weight + load(in.bias + c, lanes) + bonus * value), lanes);
                    store_if(dv, at, inner * bonus, lanes);
                    totals.add(1, c, inner * normed, lanes);
                    totals.add(2, c, inner, lanes);
                    store(dstandard + j, through);
                    dbonuses += inner * value;
                    total += through;
                    products += through * normed;
                });
                const float dbonus = sum(dbonuses), mean = sum(total) * share, along = sum(products) * share;
                each(in.size, [&](int64_t j, auto lanes) {
                    const int64_t at = head.at + j, c = head.c + j;
                    const vec r = load(in.r + at, lanes), k = load(in.k + at, lanes);
                    const vec scaled = dbonus * load(in.r_k + c, lanes);
                    store_if(dr, at, scaled * k, lanes);
                    store_if(dk, at, scaled * r, lanes);
                    totals.add(0, c, dbonus * r * k, lanes);
                    store_if(dy, at, (load(dstandard + j) - mean - load(standard + j) * along) * inverse, lanes);
                });
            }
        });
        sums.totals(threads, sizes.width, x + 13);
    });
}

}  // namespace rwkv
