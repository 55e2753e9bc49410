// What the recurrences share: rows and their checkpoints, checks of tensors, the choice of types, threads.
//
// Letters: N head size. A run is one row and one head (wkv4: one row and a block of channels), which needs nothing of
// any other run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace rwkv {

constexpr int INTERVAL = 64;  // tokens between checkpoints

// One run of `tokens` tokens, each `stride` elements after the last.
struct Run {
    int64_t first, stride, tokens;  // first: offset of the first element in the per-token inputs
    int64_t state, checkpoint;      // offsets in the states and in the checkpoints
    int64_t interval;               // elements from one checkpoint of the run to the next
    int64_t element;                // offset in a tensor of one token's shape per row, such as a partial sum
    int64_t shared;                 // offset in a tensor of one token's shape, such as a vector input
};

// The rows of a batch, or the packed segments: where each one and its checkpoints begin.
struct Rows {
    const int64_t* starts;
    int64_t count, width, block, state;  // elements of a token, of a run's token; floats of state for each
    int64_t blocks, tasks;               // runs of a row, and of all
    std::vector<int64_t> checkpoints;
    std::vector<int64_t> order;  // longest first, so that the last ones to finish are short

    Rows(const at::Tensor& starts_, int64_t width_, int64_t block_, int64_t state_)
        : starts(starts_.const_data_ptr<int64_t>()),
          count(starts_.numel() - 1),
          width(width_),
          block(block_),
          state(state_),
          blocks((width_ + block_ - 1) / block_),
          tasks(count * blocks) {
        checkpoints.push_back(0);
        for (int64_t i = 0; i < count; ++i) {
            checkpoints.push_back(checkpoints.back() + (starts[i + 1] - starts[i] + INTERVAL - 1) / INTERVAL);
            order.push_back(i);
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
            return starts[x + 1] - starts[x] > starts[y + 1] - starts[y];
        });
    }

    Run run(int64_t task) const {
        const int64_t row = order[task / blocks], at = task % blocks * block;
        return {starts[row] * width + at,
                width,
                starts[row + 1] - starts[row],
                (row * width + at) * state,
                (checkpoints[row] * width + at) * state,
                width * state,
                row * width + at,
                at};
    }
};

// ---------------------------------------------------------------- threads

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// work(task, scratch) for every task, on torch's number of threads, each with a scratch of its own.
template <typename Scratch, typename Work>
void for_tasks(int64_t tasks, const Work& work) {
    const int team = std::min<int64_t>(threads(), std::max<int64_t>(tasks, 1));
    std::vector<std::unique_ptr<Scratch>> scratch(team);
    for (auto& m : scratch) m.reset(new Scratch);  // here: nothing may throw inside the parallel loop
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t task = 0; task < tasks; ++task) work(task, *scratch[omp_get_thread_num()]);
}

// ---------------------------------------------------------------- tensors

using Tensors = std::vector<at::Tensor>;

template <typename T>
T* pointer(const at::Tensor& x) {
    return reinterpret_cast<T*>(x.data_ptr());
}

// f(a value of the element type)
template <typename F>
void by_type(const at::Tensor& x, F&& f) {
    x.scalar_type() == at::kBFloat16 ? f(bf16{}) : f(float{});
}

// f(head size as a constant, a value of the element type)
template <typename F>
void by_size(const at::Tensor& x, F&& f) {
    const auto with_type = [&](auto n) { by_type(x, [&](auto element) { f(n, element); }); };
    switch (x.size(-1)) {
        case 32: return with_type(std::integral_constant<int, 32>{});
        case 64: return with_type(std::integral_constant<int, 64>{});
        case 128: return with_type(std::integral_constant<int, 128>{});
    }
    TORCH_CHECK(false, "head size ", x.size(-1), " is not one of 32, 64, 128");
}

// What a recurrence is called with: `tokens` inputs per token of `dims` axes, then `vectors` of one token's shape, and
// states of one token's shape with an axis of `state` numbers added (0: as many as the last axis has).
struct Signature {
    const char* names;
    size_t tokens, vectors;
    int64_t dims, state;
};

// Dense copies of the inputs, after checks that keep every offset inside its memory.
inline Tensors dense(const Signature& want, at::TensorList x, const at::Tensor& starts,
                     const at::Tensor& state) {
    TORCH_CHECK(x.size() == want.tokens + want.vectors, "inputs are ", want.names);
    TORCH_CHECK(x[0].dim() == want.dims && (x[0].scalar_type() == at::kFloat || x[0].scalar_type() == at::kBFloat16),
                "inputs per token must have ", want.dims, " axes, all float32 or all bfloat16");
    const at::IntArrayRef token = x[0].sizes().slice(1);
    TORCH_CHECK(token.back() > 0, "the last axis is empty");
    Tensors y;
    for (size_t i = 0; i < x.size(); ++i) {
        const bool per_token = i < want.tokens;
        TORCH_CHECK(x[i].sizes() == (per_token ? x[0].sizes() : token) &&
                        x[i].scalar_type() == (per_token ? x[0].scalar_type() : at::kFloat),
                    "input ", i, " of ", want.names, " has another shape or type than the first allows");
        y.push_back(x[i].contiguous());
    }
    const int64_t rows = starts.numel() - 1;
    TORCH_CHECK(starts.scalar_type() == at::kLong && starts.is_contiguous() && rows >= 0, "bad starts");
    const int64_t* s = starts.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows; ++i) TORCH_CHECK(s[i] <= s[i + 1], "starts must not fall");
    TORCH_CHECK(s[0] == 0 && s[rows] == x[0].size(0), "starts must run from 0 to the number of tokens");
    std::vector<int64_t> shape{rows};
    shape.insert(shape.end(), token.begin(), token.end());
    shape.push_back(want.state ? want.state : token.back());
    TORCH_CHECK(state.scalar_type() == at::kFloat && state.sizes() == at::IntArrayRef(shape), "bad state");
    return y;
}

inline at::Tensor dense_dy(const at::Tensor& dy, const at::Tensor& y_like) {
    TORCH_CHECK(dy.sizes() == y_like.sizes() && dy.scalar_type() == y_like.scalar_type(), "bad dy");
    return dy.contiguous();
}

// The sum over rows of partial sums (rows, ...), row after row: the same for any number of threads.
inline at::Tensor sum_rows(const at::Tensor& partial) {
    const at::Tensor total = at::zeros(partial.sizes().slice(1), partial.options());
    const int64_t n = total.numel();
    float* to = total.data_ptr<float>();
    const float* from = partial.const_data_ptr<float>();
    for (int64_t row = 0; row < partial.size(0); ++row, from += n)
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    return total;
}

}  // namespace rwkv
