// Rows of logits on the CPU: statistics of log-softmax in one pass, and its gradient written over the logits. The
// mathematics is stated in ops/logprob.py, whose plain PyTorch twin judges this file.
//
// Letters: V vocabulary, m running maximum, W lanes of a register. Rows are independent, so the number of threads
// changes no bit. Arithmetic is float32; sums go on in double from block to block.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "simd.h"

namespace rwkv {
namespace {

using at::Tensor;

constexpr int64_t BLOCK = 1024;  // logits that are read twice while they are in the first-level cache
constexpr int UNROLL = 4;        // independent sums, to hide the latency of an addition

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }

INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) {
    bf16 lanes[W];
    store(lanes, splat(x));
    *to = lanes[0];
}

// The first n < W elements, the other lanes filled with `pad`.
template <typename T>
INLINE vec load_part(const T* p, int64_t n, float pad) {
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < n ? widen(p[i]) : pad;
    return load(lanes);
}

INLINE float largest(vec x) {
    float best = x[0];
    for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

INLINE double total(const vec* sums) {
    vec x = sums[0];
    for (int u = 1; u < UNROLL; ++u) x += sums[u];
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}

struct Row {
    float lse, top;
    double sum;
    int64_t argmax;
};

// Log-sum-exp by a running maximum: when a block raises m, what was summed before is scaled down.
template <typename T>
Row statistics(const T* x, int64_t V) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    float m = LOWEST;
    double exps = 0, sum = 0;
    int64_t home = 0;  // the block that holds the maximum
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
        const T* p = x + begin;
        const int64_t n = std::min(BLOCK, V - begin), full = n - n % W, step = UNROLL * W;
        vec best[UNROLL], sums[UNROLL];
        for (int u = 0; u < UNROLL; ++u) best[u] = splat(LOWEST), sums[u] = splat(0);
        const auto look = [&](vec value, int u) {
            best[u] = value > best[u] ? value : best[u];
            sums[u] += value;
        };
        int64_t j = 0;
        for (; j + step <= full; j += step)
            for (int u = 0; u < UNROLL; ++u) look(load(p + j + u * W), u);
        for (; j < full; j += W) look(load(p + j), 0);
        if (full < n) {
            const vec rest = load_part(p + full, n - full, LOWEST);
            best[0] = rest > best[0] ? rest : best[0];
            sums[0] += load_part(p + full, n - full, 0);
        }
        for (int u = 1; u < UNROLL; ++u) best[0] = best[u] > best[0] ? best[u] : best[0];
        sum += total(sums);
        const float high = largest(best[0]);
        if (high > m) {
            exps *= std::exp(static_cast<double>(m) - high);  // m = -inf: exp(-inf) = 0
            m = high;
            home = begin;
        }
        for (int u = 0; u < UNROLL; ++u) sums[u] = splat(0);
        for (j = 0; j + step <= full; j += step)
            for (int u = 0; u < UNROLL; ++u) sums[u] += exp(load(p + j + u * W) - m);
        for (; j < full; j += W) sums[0] += exp(load(p + j) - m);
        if (full < n) sums[0] += exp(load_part(p + full, n - full, LOWEST) - m);
        exps += total(sums);
    }
    int64_t argmax = home;
    const int64_t end = std::min(V, home + BLOCK);
    while (argmax < end && !(widen(x[argmax]) == m)) ++argmax;
    return {static_cast<float>(m + std::log(exps)), m, sum, argmax < end ? argmax : home};
}

// d = g_logp * (onehot(target) - p) + g_mean * (1/V - p) + g_max * onehot(argmax), over the logits.
template <typename T>
void gradient(T* x, int64_t V, float lse, int64_t target, float g_logp, float g_mean, int64_t argmax, float g_max) {
    const float scale = -(g_logp + g_mean), base = g_mean / static_cast<float>(V);
    const auto plain = [&](vec value) { return exp(value - lse) * scale + base; };
    // The two special entries gain their terms before they are rounded.
    const float at_target = plain(splat(widen(x[target])))[0] + g_logp + (argmax == target ? g_max : 0);
    const float at_top = plain(splat(widen(x[argmax])))[0] + g_max;
    const int64_t full = V - V % W;
    for (int64_t j = 0; j < full; j += W) store(x + j, plain(load(x + j)));
    for (int64_t j = full; j < V; ++j) put(x + j, plain(splat(widen(x[j])))[0]);
    if (g_max != 0) put(x + argmax, at_top);
    put(x + target, at_target);
}

// work(row) for every row, on torch's number of threads.
template <typename Work>
void for_rows(int64_t rows, int64_t V, const Work& work) {
    const int threads = rows * V > 32768 ? at::get_num_threads() : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) work(row);
}

void check(const Tensor& logits, const Tensor& targets) {
    TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1,
                "logits must be (n, V) with dense rows");
    TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16,
                "bfloat16 or float32 logits");
    TORCH_CHECK(targets.scalar_type() == at::kLong && targets.is_contiguous() && targets.numel() == logits.size(0),
                "targets must be n indices");
    const int64_t* t = targets.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < targets.numel(); ++row)
        TORCH_CHECK_INDEX(t[row] >= 0 && t[row] < logits.size(1), "token id ", t[row], " is outside the vocabulary");
}

template <typename Work>
void by_type(const Tensor& logits, const Work& work) {
    if (logits.scalar_type() == at::kFloat)
        work(static_cast<float*>(logits.data_ptr()));
    else
        work(static_cast<bf16*>(logits.data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& targets) {
    check(logits, targets);
    const int64_t rows = logits.size(0), V = logits.size(1), stride = logits.stride(0);
    const auto vector = [&] { return at::empty({rows}, logits.options().dtype(at::kFloat)); };
    const Tensor lse = vector(), picked = vector(), sum = vector(), top = vector(), argmax = at::empty_like(targets);
    float *to_lse = lse.data_ptr<float>(), *to_picked = picked.data_ptr<float>();
    float *to_sum = sum.data_ptr<float>(), *to_top = top.data_ptr<float>();
    int64_t* to_argmax = argmax.data_ptr<int64_t>();
    const int64_t* target = targets.const_data_ptr<int64_t>();
    by_type(logits, [&](const auto* x) {
        for_rows(rows, V, [&](int64_t row) {
            const Row found = statistics(x + row * stride, V);
            to_lse[row] = found.lse;
            to_picked[row] = widen(x[row * stride + target[row]]);
            to_sum[row] = static_cast<float>(found.sum);
            to_top[row] = found.top;
            to_argmax[row] = found.argmax;
        });
    });
    return {lse, picked, sum, top, argmax};
}

void row_grad_(Tensor logits, const Tensor& targets, const Tensor& lse, const Tensor& g_logp, const Tensor& g_mean,
               const Tensor& argmax, const Tensor& g_max) {
    check(logits, targets);
    check(logits, argmax);
    const int64_t rows = logits.size(0), V = logits.size(1), stride = logits.stride(0);
    for (const Tensor& t : {lse, g_logp, g_mean, g_max})
        TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == rows,
                    "n float32 numbers expected");
    const float *l = lse.const_data_ptr<float>(), *gl = g_logp.const_data_ptr<float>();
    const float *gm = g_mean.const_data_ptr<float>(), *gx = g_max.const_data_ptr<float>();
    const int64_t *t = targets.const_data_ptr<int64_t>(), *a = argmax.const_data_ptr<int64_t>();
    by_type(logits, [&](auto* x) {
        for_rows(rows, V, [&](int64_t row) {
            gradient(x + row * stride, V, l[row], t[row], gl[row], gm[row], a[row], gx[row]);
        });
    });
}

}  // namespace
}  // namespace rwkv

TORCH_LIBRARY(rwkv_logprob, m) {
    m.def("row_stats(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "row_grad_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor g_logp, Tensor g_mean, Tensor argmax,"
        " Tensor g_max) -> ()");
}

TORCH_LIBRARY_IMPL(rwkv_logprob, CPU, m) {
    m.impl("row_stats", &rwkv::row_stats);
    m.impl("row_grad_", &rwkv::row_grad_);
}
