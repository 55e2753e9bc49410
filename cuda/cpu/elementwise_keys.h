// delta_keys: removal keys of unit length per head, and the keys that replace them.
#pragma once

#include "elementwise_common.h"

namespace {

constexpr float kNormEps = 1e-12f;  // as F.normalize

// kk = k * k_k of one head before it is normalised; returns max(its length, eps).
template <class T>
float scaled_key(const T* k, const float* k_k, int n, float* kk, float* scratch) {
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    kk[j] = widen(k[j]) * k_k[j];
    scratch[j] = kk[j] * kk[j];
  }
  return std::max(std::sqrt(sum(scratch, n)), kNormEps);
}

struct KeyInputs {
  Tensor k, k_k, k_a, a0, a12;
  int64_t rows, width, size;

  KeyInputs(const Tensor& k_, const Tensor& k_k_, const Tensor& k_a_, const Tensor& a0_, const Tensor& a12_,
            int64_t heads)
      : k(k_.contiguous()), k_k(k_k_.contiguous()), k_a(k_a_.contiguous()), a0(a0_.contiguous()),
        a12(a12_.contiguous()), rows(rows_of(k_)), width(width_of(k_)), size(width / heads) {
    check_like(k, {a12});
    check_vectors(width, {k_k, k_a, a0});
    TORCH_CHECK(size * heads == width, "heads must divide the width");
  }
};

template <class T>
struct KeyPointers {
  const T *k, *a12;
  const float *k_k, *k_a, *a0;

  explicit KeyPointers(const KeyInputs& in)
      : k(input<T>(in.k)), a12(input<T>(in.a12)), k_k(input<float>(in.k_k)), k_a(input<float>(in.k_a)),
        a0(input<float>(in.a0)) {}
};

template <class T, int N>
void key_rows(const KeyInputs& in, Tensors& outs) {
  const int64_t C = in.width;
  const int n = N ? N : static_cast<int>(in.size);
  const KeyPointers<T> from(in);
  T *all_replaced = output<T>(outs[0]), *all_minus = output<T>(outs[1]), *all_scaled = output<T>(outs[2]);
  Chunks(in.rows).run(C, [&](int64_t, int64_t begin, int64_t end) {
    Buffers<float> buffers(2, n);
    float *kk = buffers[0], *scratch = buffers[1];
    for (int64_t at = begin * C, c = 0; at < end * C; at += n, c = c + n < C ? c + n : 0) {
      const T *k = from.k + at, *low = from.a12 + at;
      const float *k_a = from.k_a + c, *a0 = from.a0 + c;
      const float inverse = 1.0f / scaled_key(k, from.k_k + c, n, kk, scratch);
      T *replaced = all_replaced + at, *minus_kk = all_minus + at, *kk_a = all_scaled + at;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const float rate = sigmoid(a0[j] + widen(low[j])), unit = kk[j] * inverse;
        put(replaced + j, widen(k[j]) * (1.0f + (rate - 1.0f) * k_a[j]));
        put(minus_kk + j, -unit);
        put(kk_a + j, unit * rate);
      }
    }
  });
}

Tensors delta_keys(const Tensor& k, const Tensor& k_k, const Tensor& k_a, const Tensor& a0, const Tensor& a12,
                   int64_t heads) {
  const KeyInputs in(k, k_k, k_a, a0, a12, heads);
  Tensors outs{at::empty_like(in.k), at::empty_like(in.k), at::empty_like(in.k)};
  by_type(k, [&](auto zero) {
    by_head(in.size, [&](auto head) { key_rows<decltype(zero), decltype(head)::value>(in, outs); });
  });
  return outs;
}

template <class T, int N>
Tensors key_rows_backward(const Tensors& grads, const KeyInputs& in, const Needs<5>& need) {
  const int64_t C = in.width;
  const int n = N ? N : static_cast<int>(in.size);
  const Chunks chunks(in.rows);
  ColumnSums sums(chunks, 3, C);
  const Output<T> dk(in.k, need[0]), dlow(in.k, need[4]);
  const KeyPointers<T> from(in);
  const T *all_d0 = input<T>(grads[0]), *all_d1 = input<T>(grads[1]), *all_d2 = input<T>(grads[2]);
  chunks.run(2 * C, [&](int64_t chunk, int64_t begin, int64_t end) {
    Buffers<float> buffers(4, n);
    Buffers<T> unwanted(2, C);
    float *kk = buffers[0], *rate = buffers[1], *dkk = buffers[2], *scratch = buffers[3];
    float* totals = sums.begin(chunk);
    for (int64_t at = begin * C, c = 0, row = begin; at < end * C; at += n) {
      const T *k = from.k + at, *low = from.a12 + at, *d0 = all_d0 + at, *d1 = all_d1 + at, *d2 = all_d2 + at;
      const float *k_k = from.k_k + c, *k_a = from.k_a + c, *a0 = from.a0 + c;
      float *dk_k = totals + c, *dk_a = totals + C + c, *da0 = totals + 2 * C + c;
      T *to_k = dk.row(row, C, unwanted[0]) + c, *to_low = dlow.row(row, C, unwanted[1]) + c;
      const float length = scaled_key(k, k_k, n, kk, scratch), inverse = 1.0f / length;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        rate[j] = sigmoid(a0[j] + widen(low[j]));
        kk[j] *= inverse;
        dkk[j] = widen(d2[j]) * rate[j] - widen(d1[j]);
        scratch[j] = dkk[j] * kk[j];
      }
      // Normalising removes what dkk has in the direction of kk, but not where the divisor is a constant.
      const float along = length > kNormEps ? sum(scratch, n) : 0.0f;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const float key = widen(k[j]), d = widen(d0[j]), a = rate[j];
        const float scaled = (dkk[j] - kk[j] * along) * inverse;
        const float gate = (widen(d2[j]) * kk[j] + d * key * k_a[j]) * a * (1.0f - a);
        put(to_k + j, d * (1.0f + (a - 1.0f) * k_a[j]) + scaled * k_k[j]);
        put(to_low + j, gate);
        dk_k[j] += scaled * key;
        dk_a[j] += d * key * (a - 1.0f);
        da0[j] += gate;
      }
      c += n;
      if (c == C) c = 0, ++row;
    }
  });
  const Tensor total = need[1] || need[2] || need[3] ? sums.total() : Tensor();
  auto vector = [&](int i) { return need[1 + i] ? total[i] : Tensor(); };
  return {dk.tensor, vector(0), vector(1), vector(2), dlow.tensor};
}

Tensors delta_keys_backward(const Grads& grads, const Tensor& k, const Tensor& k_k, const Tensor& k_a, const Tensor& a0,
                            const Tensor& a12, int64_t heads, Needs<5> need) {
  const KeyInputs in(k, k_k, k_a, a0, a12, heads);
  const Tensors given{grad_at(grads, 0, in.k), grad_at(grads, 1, in.k), grad_at(grads, 2, in.k)};
  return by_type(k, [&](auto zero) {
    return by_head(in.size, [&](auto head) {
      return key_rows_backward<decltype(zero), decltype(head)::value>(given, in, need);
    });
  });
}

}  // namespace
