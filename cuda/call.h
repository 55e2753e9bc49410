// How Python calls a kernel, on a CPU (cuda/cpu/*.cpp) or a GPU (cuda/*.cu): plain C functions that know nothing of
// torch, in a library that ops/cpu.py or ops/gpu.py opens with ctypes. ops/calls.py makes the arguments.
//
// A recurrence has three of them:
//     int64_t rwkv_interval()      tokens between two checkpoints of the state
//     rwkv_forward, rwkv_backward(void* const* tensors, const int64_t* sizes, int dtype, ...)
// tensors: forward: inputs, state, places | y, final state | kept (null when backward will not run)
//          backward: inputs, kept, places, dy, gradient of the final state | gradients of the inputs and of the
//          initial state | scratch.   Per-token tensors are (tokens, H, N), or (tokens, C) for wkv4.
// `kept` is the state before each interval, (intervals, H, N, N) or (intervals, C, 3) in an order of the kernel's own,
// and for wkv7 sa, like a per-token input; both float32. All tensors are dense and begin at a multiple of 16 bytes.
// The functions allocate nothing that outlives them and return null, or the text of an error.
#pragma once

#include <type_traits>

#include "numbers.h"

#define RWKV_PUBLIC extern "C" __attribute__((visibility("default")))
#define RWKV_EXPORT RWKV_PUBLIC const char*

namespace rwkv {

constexpr int INTERVAL = 64;  // tokens between two checkpoints; Python asks rwkv_interval(), as wkv4.cu has fewer

// sizes. For wkv4, size is the number of channels C and heads is 1.
struct Sizes {
    int64_t tokens, rows, heads, size;
    int64_t intervals;  // of all rows together
};

inline Sizes sizes_of(const int64_t* x) { return {x[0], x[1], x[2], x[3], x[4]}; }

// places, int64 (3, rows + 1): where each row begins among the tokens and where among the intervals, both with a last
// entry for the end; then the rows from the longest to the shortest, so that the last ones to finish are short.
struct Places {
    const int64_t *starts, *marks, *order;
    int64_t rows;

    Places(const void* places, const Sizes& sizes) : rows(sizes.rows) {
        starts = static_cast<const int64_t*>(places);
        marks = starts + rows + 1;
        order = marks + rows + 1;
    }

    // The row that an interval belongs to.
    EVERYWHERE int64_t row_of(int64_t interval) const {
        int64_t low = 0, high = rows;  // marks[low] <= interval < marks[high]
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (marks[middle] <= interval)
                low = middle;
            else
                high = middle;
        }
        return low;
    }
};

// The i-th tensor of a call.
template <typename T>
T* tensor(void* const* tensors, int i) {
    return static_cast<T*>(tensors[i]);
}

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };

// f(a T) for the dtype of a call; null, or why there is no kernel for it.
template <typename F>
const char* by_dtype(int dtype, F&& f) {
    if (dtype == FLOAT32) return f(float{}), nullptr;
    if (dtype == BFLOAT16) return f(bf16{}), nullptr;
    return "the dtype is neither float32 nor bfloat16";
}

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// The one head size that is compiled, for a run needs no other, or 0: all of them, as in a wheel.
#ifndef RWKV_HEAD_SIZE
#define RWKV_HEAD_SIZE 0
#endif
template <int... N>
struct List {};
using HeadSizes = std::conditional_t<RWKV_HEAD_SIZE == 0, List<32, 64, 128>, List<RWKV_HEAD_SIZE>>;

template <int... N, typename F>
const char* dispatch(List<N...>, const Sizes& sizes, int dtype, F&& f) {
    if (((sizes.size != N) && ...)) return "the kernel was not compiled for this head size";
    return by_dtype(dtype, [&](auto element) { ((sizes.size == N ? f(Constant<N>{}, element) : void()), ...); });
}

// f(Constant<N>, a T) for the head size and dtype of a call; null, or why there is no kernel for them.
template <typename F>
const char* dispatch(const Sizes& sizes, int dtype, F&& f) {
    return dispatch(HeadSizes{}, sizes, dtype, f);
}

}  // namespace rwkv
