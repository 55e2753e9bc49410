// What row-wise kernels share: a partition of the rows that depends on their number alone, so that sums over rows have
// the same bits for any number of threads.
#pragma once

#include <new>

#include "simd.h"
#include "threads.h"

namespace rwkv {

// sizes of a row-wise call, as ops/elementwise.py and ops/logprob.py give them.
struct RowSizes {
    int64_t rows, width;  // of the activations
    int64_t parts;        // heads of a row, or mixes
    int64_t tokens;       // rows of a sequence, where they are all as long
    int64_t segments;     // or how many sequences `starts` has
};

inline RowSizes row_sizes(const int64_t* x) { return {x[0], x[1], x[2], x[3], x[4]}; }

// Zeroed row buffers of one thread, each on its own cache lines: vectors that straddle two lines cost twice. Whole
// registers may be written beyond `width`.
class Buffers {
  public:
    Buffers(int64_t count, int64_t width)
        : stride_((width + W - 1) / 16 * 16 + 32), memory_(new (std::align_val_t{64}) float[count * stride_]()) {}
    ~Buffers() { operator delete[](memory_, std::align_val_t{64}); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    float* operator[](int64_t index) { return memory_ + index * stride_; }

  private:
    int64_t stride_;
    float* memory_;
};

// Rows in chunks; a chunk is the unit of work and of partial sums.
struct Chunks {
    int64_t rows, size, count;

    explicit Chunks(int64_t n) : rows(n), size(std::max<int64_t>(32, (n + 127) / 128)), count((n + size - 1) / size) {}

    // work(chunk, its first row, the row after its last), each thread with neighbouring chunks.
    template <class Work>
    void run(int threads, int64_t width, const Work& work) const {
        const auto share = [&](int thread, int team) {
            for (int64_t chunk = count * thread / team; chunk < count * (thread + 1) / team; ++chunk)
                work(chunk, chunk * size, std::min(rows, (chunk + 1) * size));
        };
        on_team(rows * width > 16384 ? static_cast<int>(std::min<int64_t>(threads, count)) : 1, share);
    }
};

// Per-channel sums over rows: `vectors` sums of `width` channels, one partial per chunk, added in chunk order.
class ColumnSums {
  public:
    ColumnSums(const Chunks& chunks, int64_t vectors, int64_t width)
        : count_(chunks.count), columns_(vectors * width), partial_(new float[count_ * columns_]) {}

    // The chunk's own accumulators, (vectors, width), set to zero.
    float* begin(int64_t chunk) {
        float* sums = partial_.get() + chunk * columns_;
        std::fill(sums, sums + columns_, 0.f);
        return sums;
    }

    // to[0 .. width) = the sums of the columns from `first` on.
    void total(int threads, int64_t first, int64_t width, float* to) const {
        constexpr int64_t BLOCK = 1024;
        const int64_t blocks = (width + BLOCK - 1) / BLOCK;
        const auto add = [&](int thread, int team) {
            const int64_t left = blocks * thread / team * BLOCK;
            const int64_t n = std::min(width, blocks * (thread + 1) / team * BLOCK) - left;
            std::fill(to + left, to + left + n, 0.f);
            for (int64_t chunk = 0; chunk < count_; ++chunk) {
                const float* from = partial_.get() + chunk * columns_ + first + left;
                each(n, [&](int64_t c, auto lanes) {
                    store(to + left + c, load(to + left + c, lanes) + load(from + c, lanes), lanes);
                });
            }
        };
        on_team(width * count_ > 65536 ? static_cast<int>(std::min<int64_t>(threads, blocks)) : 1, add);
    }

    // The sums of vector i at to[i], where that is wanted.
    void totals(int threads, int64_t width, void* const* to) const {
        for (int64_t i = 0; i < columns_ / width; ++i)
            if (to[i]) total(threads, i * width, width, static_cast<float*>(to[i]));
    }

  private:
    int64_t count_, columns_;
    std::unique_ptr<float[]> partial_;
};

// A chunk's accumulators, as ColumnSums::begin gives them: vectors of `width` channels.
struct ChunkSums {
    float* sums;
    int64_t width;

    template <typename Lanes>
    INLINE void add(int64_t vector, int64_t c, vec value, Lanes lanes) const {
        float* to = sums + vector * width + c;
        store(to, load(to, lanes) + value, lanes);
    }
};

// Of a tensor that may be missing: what is read is zero, what is written is dropped.
template <typename T, typename Lanes>
INLINE vec load_if(const T* p, int64_t at, Lanes lanes) {
    return p ? load(p + at, lanes) : splat(0);
}

template <typename T, typename Lanes>
INLINE void store_if(T* p, int64_t at, vec x, Lanes lanes) {
    if (p) store(p + at, x, lanes);
}

}  // namespace rwkv
