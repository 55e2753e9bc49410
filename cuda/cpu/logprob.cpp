// Rows of logits on the CPU: statistics of log-softmax in one pass, and its gradient written over the logits. The
// mathematics is stated in ops/logprob.py, whose plain PyTorch twin judges this file.
//
// Letters: V vocabulary, m running maximum, W lanes of a register. Rows are independent, so the number of threads
// changes no bit. Arithmetic is float32; sums go on in double from block to block.
#include <limits>

#include "simd.h"
#include "threads.h"

namespace rwkv {
namespace {

constexpr int64_t BLOCK = 1024;  // logits that are read twice while they are in the first-level cache
constexpr int UNROLL = 4;        // independent sums, to hide the latency of an addition

// The first lanes, and `pad` in the others.
template <typename T>
INLINE vec load_padded(const T* p, Part part, float pad) {
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < part.count ? widen(p[i]) : pad;
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
    return sum(x);
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
        const Part last{static_cast<int>(n - full)};
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
            const vec rest = load_padded(p + full, last, LOWEST);
            best[0] = rest > best[0] ? rest : best[0];
            sums[0] += load(p + full, last);
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
        if (full < n) sums[0] += exp(load_padded(p + full, last, LOWEST) - m);
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
    each(V, [&](int64_t j, auto lanes) { store(x + j, plain(load(x + j, lanes)), lanes); });
    if (g_max != 0) narrow(at_top, x[argmax]);
    narrow(at_target, x[target]);
}

// work(row) for every row
template <typename Work>
void for_rows(int threads, int64_t rows, int64_t V, const Work& work) {
    on_team(rows * V > 32768 ? static_cast<int>(std::min<int64_t>(threads, rows)) : 1, [&](int thread, int team) {
        for (int64_t row = rows * thread / team; row < rows * (thread + 1) / team; ++row) work(row);
    });
}

// Whether all n tokens are in the vocabulary.
bool inside(const int64_t* tokens, int64_t n, int64_t V) {
    return std::all_of(tokens, tokens + n, [&](int64_t token) { return token >= 0 && token < V; });
}

constexpr const char* OUTSIDE = "a token is outside the vocabulary";

// sizes of a call: rows, vocabulary, and elements from one row of logits to the next
struct LogitSizes {
    int64_t rows, V, stride;
};

LogitSizes logit_sizes(const int64_t* x) { return {x[0], x[1], x[2]}; }

}  // namespace

// logits, targets | lse, target logit, sum and maximum of the logits, its index
RWKV_EXPORT rwkv_row_stats(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const LogitSizes sizes = logit_sizes(numbers);
    const int64_t* targets = tensor<const int64_t>(x, 1);
    if (!inside(targets, sizes.rows, sizes.V)) return OUTSIDE;
    float *lse = tensor<float>(x, 2), *picked = tensor<float>(x, 3), *sums = tensor<float>(x, 4);
    float* top = tensor<float>(x, 5);
    int64_t* argmax = tensor<int64_t>(x, 6);
    return by_dtype(dtype, [&](auto element) {
        const auto* logits = tensor<const decltype(element)>(x, 0);
        for_rows(threads, sizes.rows, sizes.V, [&](int64_t row) {
            const auto* p = logits + row * sizes.stride;
            const Row found = statistics(p, sizes.V);
            lse[row] = found.lse;
            picked[row] = widen(p[targets[row]]);
            sums[row] = static_cast<float>(found.sum);
            top[row] = found.top;
            argmax[row] = found.argmax;
        });
    });
}

// logits, targets, lse, g_logp, g_mean, argmax, g_max: the logits are overwritten by their gradient
RWKV_EXPORT rwkv_row_grad(void* const* x, const int64_t* numbers, int dtype, int threads) {
    const LogitSizes sizes = logit_sizes(numbers);
    const int64_t *targets = tensor<const int64_t>(x, 1), *argmax = tensor<const int64_t>(x, 5);
    const float *lse = tensor<const float>(x, 2), *g_logp = tensor<const float>(x, 3);
    const float *g_mean = tensor<const float>(x, 4), *g_max = tensor<const float>(x, 6);
    if (!inside(targets, sizes.rows, sizes.V) || !inside(argmax, sizes.rows, sizes.V)) return OUTSIDE;
    return by_dtype(dtype, [&](auto element) {
        auto* logits = tensor<decltype(element)>(x, 0);
        for_rows(threads, sizes.rows, sizes.V, [&](int64_t row) {
            gradient(logits + row * sizes.stride, sizes.V, lse[row], targets[row], g_logp[row], g_mean[row],
                     argmax[row], g_max[row]);
        });
    });
}

}  // namespace rwkv
