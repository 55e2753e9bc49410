// gated_norm: normalisation per head, the bonus of the current token, and the gate.
#pragma once

#include "elementwise_common.h"

namespace {

struct NormInputs {
  Tensor y, r, k, v, r_k, weight, bias, g;
  int64_t rows, width, size;
  float eps;

  NormInputs(const Tensor& y_, const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& r_k_,
             const Tensor& weight_, const Tensor& bias_, const Tensor& g_, double eps_)
      : y(y_.contiguous()), r(r_.contiguous()), k(k_.contiguous()), v(v_.contiguous()), r_k(r_k_.contiguous()),
        weight(weight_.contiguous()), bias(bias_.contiguous()), g(g_.contiguous()), width(y_.size(-1) * y_.size(-2)),
        size(y_.size(-1)), eps(static_cast<float>(eps_)) {
    rows = y.numel() / std::max<int64_t>(1, width);
    check_like(y, {r, k, v, g});
    check_vectors(width, {r_k, weight, bias});
  }
};

template <class T>
struct NormPointers {
  const T *y, *r, *k, *v, *g;
  const float *r_k, *weight, *bias;
  float eps;

  explicit NormPointers(const NormInputs& in)
      : y(input<T>(in.y)), r(input<T>(in.r)), k(input<T>(in.k)), v(input<T>(in.v)), g(input<T>(in.g)),
        r_k(input<float>(in.r_k)), weight(input<float>(in.weight)), bias(input<float>(in.bias)), eps(in.eps) {}
};

// One head of one token: standard[j] = (y - mean) / sqrt(var + eps); bonus = sum r k r_k.
template <class T, int N>
struct NormHead {
  const T *y, *r, *k, *v, *g;
  const float *r_k, *weight, *bias;
  float inverse, bonus;

  NormHead(const NormPointers<T>& from, int64_t at, int64_t c, int n, float* standard, float* scratch)
      : y(from.y + at), r(from.r + at), k(from.k + at), v(from.v + at), g(from.g + at), r_k(from.r_k + c),
        weight(from.weight + c), bias(from.bias + c) {
    const int count = N ? N : n;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      standard[j] = widen(y[j]);
      scratch[j] = widen(r[j]) * widen(k[j]) * r_k[j];
    }
    const float mean = sum(standard, count) / static_cast<float>(count), dot = sum(scratch, count);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      standard[j] -= mean;
      scratch[j] = standard[j] * standard[j];
    }
    const float scale = 1.0f / std::sqrt(sum(scratch, count) / static_cast<float>(count) + from.eps);
#pragma omp simd
    for (int j = 0; j < count; ++j) standard[j] *= scale;
    inverse = scale;
    bonus = dot;
  }
};

template <class T, int N>
void norm_rows(const NormInputs& in, Tensor& out) {
  const int64_t C = in.width;
  const int n = N ? N : static_cast<int>(in.size);
  const NormPointers<T> from(in);
  T* all_out = output<T>(out);
  Chunks(in.rows).run(C, [&](int64_t, int64_t begin, int64_t end) {
    Buffers<float> buffers(2, n);
    float *standard = buffers[0], *scratch = buffers[1];
    for (int64_t at = begin * C, c = 0; at < end * C; at += n, c = c + n < C ? c + n : 0) {
      const NormHead<T, N> h(from, at, c, n, standard, scratch);
      T* to = all_out + at;
      const float bonus = h.bonus;
#pragma omp simd
      for (int j = 0; j < n; ++j)
        put(to + j, (standard[j] * h.weight[j] + h.bias[j] + bonus * widen(h.v[j])) * widen(h.g[j]));
    }
  });
}

Tensors gated_norm(const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& r_k,
                   const Tensor& weight, const Tensor& bias, const Tensor& g, double eps) {
  const NormInputs in(y, r, k, v, r_k, weight, bias, g, eps);
  Tensor out = at::empty_like(in.g);
  by_type(y, [&](auto zero) {
    by_head(in.size, [&](auto head) { norm_rows<decltype(zero), decltype(head)::value>(in, out); });
  });
  return {out};
}

template <class T, int N>
Tensors norm_rows_backward(const Tensor& grad, const NormInputs& in, const Needs<8>& need) {
  const int64_t C = in.width;
  const int n = N ? N : static_cast<int>(in.size);
  const Chunks chunks(in.rows);
  ColumnSums sums(chunks, 3, C);
  const Output<T> dy(in.y, need[0]), dr(in.r, need[1]), dk(in.k, need[2]), dv(in.v, need[3]), dg(in.g, need[7]);
  const NormPointers<T> from(in);
  const T* all_d = input<T>(grad);
  chunks.run(2 * C, [&](int64_t chunk, int64_t begin, int64_t end) {
    Buffers<float> buffers(4, n);
    Buffers<T> unwanted(5, C);
    float *standard = buffers[0], *dstandard = buffers[1], *products = buffers[2], *valued = buffers[3];
    float* totals = sums.begin(chunk);
    for (int64_t at = begin * C, c = 0, row = begin; at < end * C; at += n) {
      const NormHead<T, N> h(from, at, c, n, standard, products);
      const T *d = all_d + at, *r = h.r, *k = h.k, *v = h.v, *g = h.g;
      const float *weight = h.weight, *bias = h.bias, *r_k = h.r_k, bonus = h.bonus;
      float *dr_k = totals + c, *dweight = totals + C + c, *dbias = totals + 2 * C + c;
      T *to_y = dy.row(row, C, unwanted[0]) + c, *to_r = dr.row(row, C, unwanted[1]) + c;
      T *to_k = dk.row(row, C, unwanted[2]) + c, *to_v = dv.row(row, C, unwanted[3]) + c;
      T* to_g = dg.row(row, C, unwanted[4]) + c;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const float dout = widen(d[j]), inner = dout * widen(g[j]), value = widen(v[j]);
        put(to_g + j, dout * (standard[j] * weight[j] + bias[j] + bonus * value));
        put(to_v + j, inner * bonus);
        dweight[j] += inner * standard[j];
        dbias[j] += inner;
        valued[j] = inner * value;
        dstandard[j] = inner * weight[j];
        products[j] = dstandard[j] * standard[j];
      }
      const float dbonus = sum(valued, n), mean = sum(dstandard, n) / static_cast<float>(n);
      const float along = sum(products, n) / static_cast<float>(n);
      const float inverse = h.inverse;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const float rj = widen(r[j]), kj = widen(k[j]), scaled = dbonus * r_k[j];
        put(to_r + j, scaled * kj);
        put(to_k + j, scaled * rj);
        dr_k[j] += dbonus * rj * kj;
        put(to_y + j, (dstandard[j] - mean - standard[j] * along) * inverse);
      }
      c += n;
      if (c == C) c = 0, ++row;
    }
  });
  const Tensor total = need[4] || need[5] || need[6] ? sums.total() : Tensor();
  auto vector = [&](int i) { return need[4 + i] ? total[i] : Tensor(); };
  const Tensor by_heads = need[4] ? vector(0).view(in.r_k.sizes()) : Tensor();
  return {dy.tensor, dr.tensor, dk.tensor, dv.tensor, by_heads, vector(1), vector(2), dg.tensor};
}

Tensors gated_norm_backward(const Grads& grads, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v,
                            const Tensor& r_k, const Tensor& weight, const Tensor& bias, const Tensor& g, double eps,
                            Needs<8> need) {
  const NormInputs in(y, r, k, v, r_k, weight, bias, g, eps);
  const Tensor grad = grad_at(grads, 0, in.g);
  return by_type(y, [&](auto zero) {
    return by_head(in.size, [&](auto head) {
      return norm_rows_backward<decltype(zero), decltype(head)::value>(grad, in, need);
    });
  });
}

}  // namespace
