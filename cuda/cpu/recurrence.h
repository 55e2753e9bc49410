// What the recurrences share: rows and their checkpoints.
//
// Letters: N head size. A run is one row and one head (wkv4: one row and a block of channels), which needs nothing of
// any other run.
#pragma once

#include <array>
#include <type_traits>

#include "simd.h"
#include "threads.h"

namespace rwkv {

// One run of `tokens` tokens, each `stride` elements after the last.
struct Run {
    int64_t first, stride, tokens;  // first: offset of the first element in the per-token inputs
    int64_t state, checkpoint;      // offsets in the states and in the checkpoints
    int64_t interval;               // elements from one checkpoint of the run to the next
    int64_t element;                // offset in a tensor of one token's shape per row, such as a partial sum
    int64_t shared;                 // offset in a tensor of one token's shape, such as a vector input
};

// The rows of a batch, or the packed segments, and the runs they are cut into.
struct Rows {
    Places places;
    int64_t width, block, state;  // elements of a token, of a run's token; floats of state for each
    int64_t blocks, tasks;        // runs of a row, and of all

    Rows(const void* places_, const Sizes& sizes, int64_t block_, int64_t state_)
        : places(places_, sizes),
          width(sizes.heads * sizes.size),
          block(block_),
          state(state_),
          blocks((width + block - 1) / block),
          tasks(sizes.rows * blocks) {}

    Run run(int64_t task) const {
        const int64_t row = places.order[task / blocks], at = task % blocks * block;
        return {places.starts[row] * width + at,
                width,
                places.starts[row + 1] - places.starts[row],
                (row * width + at) * state,
                (places.marks[row] * width + at) * state,
                width * state,
                row * width + at,
                at};
    }
};

// total = the sum over rows of partial sums (rows, width), row after row: the same for any number of threads.
inline void sum_rows(const std::vector<float>& partial, int64_t width, float* total) {
    std::fill(total, total + width, 0.f);
    for (size_t from = 0; from < partial.size(); from += width)
        for (int64_t i = 0; i < width; ++i) total[i] += partial[from + i];
}

// With fewer heads than threads, several threads share a head's N values: how many values each one has.
template <int N>
int values_of_a_task(int64_t heads, int threads) {
    int width = N;
    while (heads * (N / width) < threads && width > W) width /= 2;
    return width;
}

}  // namespace rwkv
