// token_mix: every token interpolated with its predecessor.
#pragma once

#include "elementwise_common.h"

namespace {

// For every row -1, or, where a sequence begins, which row of `last` precedes it.
std::vector<int64_t> sequence_heads(const Tensor& x, const optional<Tensor>& starts) {
  const int64_t rows = rows_of(x), tokens = x.size(1);
  std::vector<int64_t> heads(rows, -1);
  if (!starts.has_value()) {
    for (int64_t row = 0, b = 0; row < rows; row += tokens) heads[row] = b++;
    return heads;
  }
  const Tensor bounds = starts->to(at::kCPU, at::kLong).contiguous();
  const int64_t* s = bounds.const_data_ptr<int64_t>();
  for (int64_t i = 0; i + 1 < bounds.numel(); ++i) {
    TORCH_CHECK(s[i] >= 0 && s[i] <= s[i + 1] && s[i + 1] <= rows, "starts must rise from 0 to T");
    if (s[i] < s[i + 1]) heads[s[i]] = i;
  }
  TORCH_CHECK(rows == 0 || heads[0] >= 0, "starts must begin with 0");
  return heads;
}

struct MixInputs {
  Tensor x, last, mixes;  // `last` may be undefined: zeros
  int64_t rows, width, count;
  std::vector<int64_t> heads;

  MixInputs(const Tensor& x_, const optional<Tensor>& last_, const Tensor& mixes_, const optional<Tensor>& starts)
      : x(x_.contiguous()), mixes(mixes_.contiguous()), rows(rows_of(x_)), width(width_of(x_)), count(mixes_.size(0)),
        heads(sequence_heads(x_, starts)) {
    check_vectors(count * width, {mixes});
    if (!last_.has_value()) return;
    last = last_->contiguous();
    check_vectors((starts.has_value() ? starts->numel() - 1 : x.size(0)) * width, {last});
  }

  // delta = shift(x) - x of one row
  template <class T>
  void difference(int64_t row, float* delta) const {
    const int64_t C = width, head = heads[row];
    const T* now = input<T>(x) + row * C;
    if (head < 0) {
      const T* before = now - C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) delta[c] = widen(before[c]) - widen(now[c]);
    } else if (last.defined()) {
      const float* before = input<float>(last) + head * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) delta[c] = before[c] - widen(now[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) delta[c] = -widen(now[c]);
    }
  }
};

template <class T>
void mix_rows(const MixInputs& in, Tensors& outs) {
  const int64_t C = in.width;
  const float* mixes = input<float>(in.mixes);
  std::vector<T*> to;
  for (Tensor& out : outs) to.push_back(output<T>(out));
  Chunks(in.rows).run(C * in.count, [&](int64_t, int64_t begin, int64_t end) {
    Buffers<float> scratch(1, C);
    float* delta = scratch[0];
    for (int64_t row = begin; row < end; ++row) {
      const T* x = input<T>(in.x) + row * C;
      in.difference<T>(row, delta);
      for (int64_t m = 0; m < in.count; ++m) {
        T* out = to[m] + row * C;
        const float* mix = mixes + m * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) put(out + c, widen(x[c]) + delta[c] * mix[c]);
      }
    }
  });
}

Tensors token_mix(const Tensor& x, const optional<Tensor>& last, const Tensor& mixes, const optional<Tensor>& starts) {
  const MixInputs in(x, last, mixes, starts);
  Tensors outs;
  for (int64_t m = 0; m < in.count; ++m) outs.push_back(at::empty_like(in.x));
  by_type(x, [&](auto zero) { mix_rows<decltype(zero)>(in, outs); });
  return outs;
}

// A row's gradient waits for the row after it, in whose outputs it also has a part.
template <class T>
Tensors mix_rows_backward(const Tensors& grads, const MixInputs& in, bool want_x, bool want_last, bool want_mixes) {
  const int64_t C = in.width, M = in.count;
  const float* mixes = input<float>(in.mixes);
  const Chunks chunks(in.rows);
  ColumnSums sums(chunks, M, C);
  const Output<T> dx(in.x, want_x);
  Tensor dlast = want_last ? at::zeros_like(in.last) : Tensor();
  float* all_dlast = want_last ? dlast.data_ptr<float>() : nullptr;
  std::vector<const T*> from;
  for (const Tensor& g : grads) from.push_back(g.defined() ? input<T>(g) : nullptr);
  // to_before = sum_m g_m mix_m, what one row gives the row before it; to_self = sum_m g_m (1 - mix_m)
  auto spread = [&](int64_t row, const float* delta, float* to_self, float* to_before, float* dmixes) {
    std::fill(to_self, to_self + C, 0.0f);
    std::fill(to_before, to_before + C, 0.0f);
    for (int64_t m = 0; m < M; ++m) {
      if (from[m] == nullptr) continue;
      const T* g = from[m] + row * C;
      const float* mix = mixes + m * C;
      float* dmix = dmixes + m * C;
      if (row + 1 < in.rows) prefetch_row(g + C, C);
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float here = widen(g[c]), moved = here * mix[c];
        to_before[c] += moved;
        to_self[c] += here - moved;
        dmix[c] += here * delta[c];
      }
    }
  };
  chunks.run(C * M, [&](int64_t chunk, int64_t begin, int64_t end) {
    Buffers<float> scratch(4, C), unused(1, M * C);
    Buffers<T> unwanted(1, C);
    float *delta = scratch[0], *to_before = scratch[1], *to_self = scratch[2], *waiting = scratch[3];
    float* dmixes = sums.begin(chunk);
    for (int64_t row = begin; row <= end; ++row) {
      const bool interior = row < in.rows && in.heads[row] < 0;
      if (row < end) {
        in.difference<T>(row, delta);
        spread(row, delta, to_self, to_before, dmixes);
        if (want_last && !interior) std::copy(to_before, to_before + C, all_dlast + in.heads[row] * C);
      } else if (interior) {  // belongs to the next chunk, which will count it in its sums
        spread(row, delta, to_self, to_before, unused[0]);
      }
      if (row > begin) {
        if (!interior) std::fill(to_before, to_before + C, 0.0f);
        T* out = dx.row(row - 1, C, unwanted[0]);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) put(out + c, waiting[c] + to_before[c]);
      }
      std::swap(to_self, waiting);
    }
  });
  return {dx.tensor, dlast, want_mixes ? sums.total() : Tensor(), Tensor()};  // starts: none
}

Tensors token_mix_backward(const Grads& grads, const Tensor& x, const optional<Tensor>& last, const Tensor& mixes,
                           const optional<Tensor>& starts, Needs<4> need) {
  const MixInputs in(x, last, mixes, starts);
  TORCH_CHECK(static_cast<int64_t>(grads.size()) == in.count, "one gradient per mix");
  Tensors given;
  for (size_t m = 0; m < grads.size(); ++m) {
    const optional<Tensor> g = grads.get(m);
    given.push_back(g.has_value() && g->defined() ? grad_at(grads, m, in.x) : Tensor());
  }
  return by_type(x, [&](auto zero) {
    return mix_rows_backward<decltype(zero)>(given, in, need[0], need[1] && in.last.defined(), need[2]);
  });
}

}  // namespace
