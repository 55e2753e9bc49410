// What row-wise kernels share: bfloat16 and float32 elements, a sigmoid that vectorises, and a partition of the rows
// that depends on their number alone, so that sums over rows have the same bits for any number of threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace rows {

using bf16 = uint16_t;

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline void put(float* to, float x) { *to = x; }

// Rounds to nearest even; the integer addition would turn some NaNs into infinity, so these are chosen separately.
inline void put(bf16* to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bf16>(x == x ? rounded : 0x7fc0u);
}

// 1 / (1 + exp(-x)), relative error < 3e-7, NaN for NaN. With e = exp(-|x|) in (0, 1] it is 1 / (1 + e), or e / (1 + e)
// for x < 0. e = 2^n e^f with |f| <= ln(2)/2 and a polynomial for e^f. |x| is limited to 87 as an integer, because
// compilers turn comparisons of floats with constants into several versions of all that follows.
inline float sigmoid(float x) {
  const uint32_t magnitude = std::bit_cast<uint32_t>(x) & 0x7fffffffu;
  const float a = std::bit_cast<float>(std::min(magnitude, std::bit_cast<uint32_t>(87.0f)));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const float shifted = magic - a * 1.44269504f;
  const float n = shifted - magic;
  const float f = (-a - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const float e = p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  const float s = (x < 0.0f ? e : 1.0f) / (1.0f + e);
  return x == x ? s : x;
}

// Zeroed row buffers of one thread, each on its own cache lines: vectors that straddle two lines cost twice.
template <class T>
class Buffers {
 public:
  Buffers(int64_t count, int64_t width)
      : lines_(width * static_cast<int64_t>(sizeof(T)) / 64 + 2), memory_(count * lines_) {}
  T* operator[](int64_t index) { return reinterpret_cast<T*>(memory_.data() + index * lines_); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  int64_t lines_;
  std::vector<Line> memory_;
};

// Sum of the first n floats of a row of `Buffers`, of which nothing beyond n was written. Whole vectors and then
// halves: a loop with a reduction clause ends in sixteen additions one after the other.
inline float sum(const float* p, int64_t n) {
  typedef float Vector16 __attribute__((vector_size(64)));
  typedef float Vector8 __attribute__((vector_size(32)));
  typedef float Vector4 __attribute__((vector_size(16)));
  Vector16 all;
  std::memcpy(&all, p, sizeof all);
  for (int64_t j = 16; j < n; j += 16) {
    Vector16 next;
    std::memcpy(&next, p + j, sizeof next);
    all += next;
  }
  Vector8 low8, high8;
  std::memcpy(&low8, &all, sizeof low8);
  std::memcpy(&high8, reinterpret_cast<char*>(&all) + sizeof low8, sizeof high8);
  low8 += high8;
  Vector4 low4, high4;
  std::memcpy(&low4, &low8, sizeof low4);
  std::memcpy(&high4, reinterpret_cast<char*>(&low8) + sizeof low4, sizeof high4);
  low4 += high4;
  return (low4[0] + low4[2]) + (low4[1] + low4[3]);
}

template <class T>
void prefetch_row(const T* p, int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t c = 0; c < width; c += line) __builtin_prefetch(p + c);
}

// Rows in chunks; a chunk is the unit of work and of partial sums.
struct Chunks {
  int64_t rows, size, count;

  explicit Chunks(int64_t n) : rows(n), size(std::max<int64_t>(32, (n + 127) / 128)), count((n + size - 1) / size) {}

  template <class Work>
  void run(int64_t width, const Work& work) const {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (int64_t chunk = 0; chunk < count; ++chunk)
      work(chunk, chunk * size, std::min(rows, (chunk + 1) * size));
  }
};

// Per-channel sums over rows: `vectors` sums of `width` channels, one partial per chunk, added in chunk order.
class ColumnSums {
 public:
  ColumnSums(const Chunks& chunks, int64_t vectors, int64_t width)
      : count_(chunks.count),
        width_(width),
        vectors_(vectors),
        partial_(at::empty({count_, vectors, width}, at::kFloat)) {}

  // The chunk's own accumulators, (vectors, width), set to zero.
  float* begin(int64_t chunk) {
    float* sums = partial_.data_ptr<float>() + chunk * vectors_ * width_;
    std::fill(sums, sums + vectors_ * width_, 0.0f);
    return sums;
  }

  // (vectors, width)
  at::Tensor total() const {
    at::Tensor out = at::zeros({vectors_, width_}, at::kFloat);
    const int64_t columns = vectors_ * width_, count = count_, block = 1024;
    const float* from = partial_.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
#pragma omp parallel for schedule(static) if (columns * count > 65536)
    for (int64_t left = 0; left < columns; left += block) {
      const int64_t right = std::min(columns, left + block);
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        const float* row = from + chunk * columns;
#pragma omp simd
        for (int64_t c = left; c < right; ++c) to[c] += row[c];
      }
    }
    return out;
  }

 private:
  int64_t count_, width_, vectors_;
  at::Tensor partial_;
};

// Fetch these before a loop: a tensor checks itself at every call.
template <class T>
const T* input(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* output(at::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// A gradient to be written row by row, or, where nobody wants it, one row that all rows overwrite.
template <class T>
class Output {
 public:
  Output(const at::Tensor& like, bool wanted) {
    if (wanted) tensor = at::empty_like(like, at::MemoryFormat::Contiguous);
    to_ = wanted ? static_cast<T*>(tensor.data_ptr()) : nullptr;
  }
  T* row(int64_t index, int64_t width, T* unwanted) const { return to_ ? to_ + index * width : unwanted; }

  at::Tensor tensor;

 private:
  T* to_;
};

// Calls f with a zero of the element type.
template <class F>
auto by_type(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "element type must be float32 or bfloat16, not ", x.scalar_type());
  return f(bf16{});
}

// Calls f with the head size as a compile-time number, 0 standing for any other.
template <class F>
auto by_head(int64_t size, const F& f) {
  if (size == 64) return f(std::integral_constant<int, 64>{});
  if (size == 32) return f(std::integral_constant<int, 32>{});
  if (size == 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 0>{});
}

}  // namespace rows
