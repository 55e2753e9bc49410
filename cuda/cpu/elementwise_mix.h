// token_mix: every token interpolated with its predecessor.
#pragma once

#include "rows.h"

namespace rwkv {
namespace {

template <typename T>
struct MixInputs {
    const T* x;
    const float *last, *mixes;  // `last` may be null: zeros
    int64_t rows, width, count;
    std::vector<int64_t> heads;  // for every row -1, or, where a sequence begins, which row of `last` precedes it

    MixInputs(void* const* tensors, const RowSizes& sizes)
        : x(tensor<const T>(tensors, 0)),
          last(tensor<const float>(tensors, 1)),
          mixes(tensor<const float>(tensors, 2)),
          rows(sizes.rows),
          width(sizes.width),
          count(sizes.parts),
          heads(sizes.rows, -1) {
        const int64_t* starts = tensor<const int64_t>(tensors, 3);  // null: all sequences are as long
        for (int64_t i = 0; i < sizes.segments; ++i) {
            const int64_t begin = starts ? starts[i] : i * sizes.tokens;
            const int64_t end = starts ? starts[i + 1] : begin + sizes.tokens;
            if (begin < end) heads[begin] = i;
        }
    }

    // delta = shift(x) - x of one row
    void difference(int64_t row, float* delta) const {
        const T *now = x + row * width, *before = now - width;
        const int64_t head = heads[row];
        const float* state = last && head >= 0 ? last + head * width : nullptr;
        if (head < 0)
            each(width,
                 [&](int64_t c, auto lanes) { store(delta + c, load(before + c, lanes) - load(now + c, lanes)); });
        else
            each(width,
                 [&](int64_t c, auto lanes) { store(delta + c, load_if(state, c, lanes) - load(now + c, lanes)); });
    }
};

template <typename T>
struct MixGrads {
    const MixInputs<T>& in;
    void* const* grads;  // of each output; may be null

    // What one row gives the row before it, sum_m g_m mix_m, and itself, sum_m g_m (1 - mix_m); adds to dmixes.
    void spread(int64_t row, const float* delta, float* to_self, float* to_before, float* dmixes) const {
        const int64_t C = in.width;
        std::fill(to_self, to_self + C, 0.f);
        std::fill(to_before, to_before + C, 0.f);
        for (int64_t m = 0; m < in.count; ++m) {
            if (!grads[m]) continue;
            const T* g = tensor<const T>(grads, m) + row * C;
            const float* mix = in.mixes + m * C;
            float* dmix = dmixes + m * C;
            if (row + 1 < in.rows) prefetch(g + C, static_cast<int>(C));
            each(C, [&](int64_t c, auto lanes) {
                const vec here = load(g + c, lanes), moved = here * load(mix + c, lanes);
                store(to_before + c, load(to_before + c) + moved);
                store(to_self + c, load(to_self + c) + (here - moved));
                store(dmix + c, load(dmix + c, lanes) + here * load(delta + c), lanes);
            });
        }
    }
};

}  // namespace

// x, last (may be null), mixes, starts (may be null) | an output for each mix
RWKV_EXPORT rwkv_token_mix(void* const* x, const int64_t* numbers, int dtype, int threads) {
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const MixInputs<T> in(x, row_sizes(numbers));
        const int64_t C = in.width;
        Chunks(in.rows).run(threads, C * in.count, [&](int64_t, int64_t begin, int64_t end) {
            Buffers scratch(1, C);
            float* delta = scratch[0];
            for (int64_t row = begin; row < end; ++row) {
                in.difference(row, delta);
                const T* now = in.x + row * C;
                for (int64_t m = 0; m < in.count; ++m) {
                    const float* mix = in.mixes + m * C;
                    T* out = tensor<T>(x, 4 + m) + row * C;
                    each(C, [&](int64_t c, auto lanes) {
                        store(out + c, load(now + c, lanes) + load(delta + c) * load(mix + c, lanes), lanes);
                    });
                }
            }
        });
    });
}

// the outputs' gradients, x, last, mixes, starts | dx, dlast, dmixes. A row's gradient waits for the row after it, in
// whose outputs it also has a part.
RWKV_EXPORT rwkv_token_mix_backward(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const RowSizes sizes = row_sizes(numbers);
    return by_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t C = sizes.width, M = sizes.parts;
        const MixInputs<T> in(x + M, sizes);
        const MixGrads<T> grads{in, x};
        T* dx = tensor<T>(x, M + 4);
        float *dlast = tensor<float>(x, M + 5), *dmixes = tensor<float>(x, M + 6);
        if (dlast) std::fill(dlast, dlast + sizes.segments * C, 0.f);
        const Chunks chunks(in.rows);
        ColumnSums sums(chunks, M, C);
        chunks.run(threads, C * M, [&](int64_t chunk, int64_t begin, int64_t end) {
            Buffers scratch(4, C), unused(1, M * C);
            float *delta = scratch[0], *to_before = scratch[1], *to_self = scratch[2], *waiting = scratch[3];
            float* totals = sums.begin(chunk);
            for (int64_t row = begin; row <= end; ++row) {
                const bool interior = row < in.rows && in.heads[row] < 0;
                if (row < end) {
                    in.difference(row, delta);
                    grads.spread(row, delta, to_self, to_before, totals);
                    if (dlast && !interior) std::copy(to_before, to_before + C, dlast + in.heads[row] * C);
                } else if (interior) {  // belongs to the next chunk, which will count it in its sums
                    grads.spread(row, delta, to_self, to_before, unused[0]);
                }
                if (dx && row > begin) {
                    if (!interior) std::fill(to_before, to_before + C, 0.f);
                    T* out = dx + (row - 1) * C;
                    each(C, [&](int64_t c, auto lanes) {
                        store(out + c, load(waiting + c) + load(to_before + c), lanes);
                    });
                }
                std::swap(to_self, waiting);
            }
        });
        if (dmixes) sums.total(threads, 0, M * C, dmixes);
    });
}

}  // namespace rwkv
