// Element-wise groups of RWKV-7, forward and backward each in one pass over the rows. The mathematics and the shapes
// are stated in ops/elementwise_naive.py, the twin that judges these. Activations are float32 or bfloat16, small
// vectors float32, arithmetic float32. Only inputs are saved: the backward passes compute the rest again.
// Letters: rows = B * T, C width, N head size; a leading d marks a gradient.
#include <torch/library.h>

#include "elementwise_common.h"
#include "elementwise_keys.h"
#include "elementwise_mix.h"
#include "elementwise_norm.h"

namespace {

Tensors value_gate(const Tensor& v_, const Tensor& first_, const Tensor& v0_, const Tensor& v12_) {
  const Tensor v = v_.contiguous(), first = first_.contiguous(), v0 = v0_.contiguous(), v12 = v12_.contiguous();
  const int64_t C = width_of(v);
  check_like(v, {first, v12});
  check_vectors(C, {v0});
  Tensor out = at::empty_like(v);
  by_type(v, [&](auto zero) {
    using T = decltype(zero);
    const T *all_v = input<T>(v), *all_first = input<T>(first), *all_low = input<T>(v12);
    const float* bias = input<float>(v0);
    T* all_out = output<T>(out);
    Chunks(rows_of(v)).run(C, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *a = all_v + row * C, *b = all_first + row * C, *z = all_low + row * C;
        T* to = all_out + row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const float value = widen(a[c]);
          put(to + c, value + (widen(b[c]) - value) * sigmoid(bias[c] + widen(z[c])));
        }
      }
    });
  });
  return {out};
}

Tensors value_gate_backward(const Grads& grads, const Tensor& v_, const Tensor& first_, const Tensor& v0_,
                            const Tensor& v12_, Needs<4> need) {
  const Tensor v = v_.contiguous(), first = first_.contiguous(), v0 = v0_.contiguous(), v12 = v12_.contiguous();
  const Tensor g = grad_at(grads, 0, v);
  const int64_t C = width_of(v);
  check_like(v, {first, v12});
  check_vectors(C, {v0});
  const Chunks chunks(rows_of(v));
  ColumnSums sums(chunks, 1, C);
  return by_type(v, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    const Output<T> dv(v, need[0]), dfirst(v, need[1]), dlow(v, need[3]);
    const T *all_v = input<T>(v), *all_first = input<T>(first), *all_low = input<T>(v12), *all_g = input<T>(g);
    const float* bias = input<float>(v0);
    chunks.run(C, [&](int64_t chunk, int64_t begin, int64_t end) {
      Buffers<T> unwanted(3, C);
      float* dbias = sums.begin(chunk);
      for (int64_t row = begin; row < end; ++row) {
        const T *a = all_v + row * C, *b = all_first + row * C, *z = all_low + row * C, *dy = all_g + row * C;
        T *da = dv.row(row, C, unwanted[0]), *db = dfirst.row(row, C, unwanted[1]);
        T* dz = dlow.row(row, C, unwanted[2]);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const float d = widen(dy[c]), s = sigmoid(bias[c] + widen(z[c]));
          const float through = d * s, low = through * (1.0f - s) * (widen(b[c]) - widen(a[c]));
          put(da + c, d - through);
          put(db + c, through);
          put(dz + c, low);
          dbias[c] += low;
        }
      }
    });
    return {dv.tensor, dfirst.tensor, need[2] ? sums.total()[0] : Tensor(), dlow.tensor};
  });
}


constexpr int64_t kBlock = 2048;  // elements that count as one row

// to[i] = f(a[i], b[i]) for tensors of one type
template <class F>
Tensor for_elements(const Tensor& a_, const Tensor& b_, const F& f) {
  const Tensor a = a_.contiguous(), b = b_.contiguous();
  Tensor out = at::empty_like(a);
  const int64_t n = a.numel();
  check_like(a, {b});
  by_type(a, [&](auto zero) {
    using T = decltype(zero);
    const T *x = input<T>(a), *y = input<T>(b);
    T* to = output<T>(out);
    Chunks((n + kBlock - 1) / kBlock).run(kBlock, [&](int64_t, int64_t begin, int64_t end) {
      const int64_t right = std::min(n, end * kBlock);
#pragma omp simd
      for (int64_t i = begin * kBlock; i < right; ++i) put(to + i, f(widen(x[i]), widen(y[i])));
    });
  });
  return out;
}

Tensor relu_squared(const Tensor& x) {
  return for_elements(x, x, [](float value, float) {
    const float positive = value < 0.0f ? 0.0f : value;
    return positive * positive;
  });
}

// From the output, which the next matrix product keeps anyway: d(x^2)/dx = 2 x = 2 sqrt(output).
Tensor relu_squared_backward(const Tensor& grad, const Tensor& out) {
  return for_elements(grad, out, [](float d, float square) { return 2.0f * d * std::sqrt(square); });
}

}  // namespace

TORCH_LIBRARY(rwkv_elementwise, m) {
  m.def("token_mix(Tensor x, Tensor? last, Tensor mixes, Tensor? starts) -> Tensor[]");
  m.def("token_mix_backward(Tensor?[] grads, Tensor x, Tensor? last, Tensor mixes, Tensor? starts, bool[4] need)"
        " -> Tensor[]");
  m.def("value_gate(Tensor v, Tensor v_first, Tensor v0, Tensor v12) -> Tensor[]");
  m.def("value_gate_backward(Tensor?[] grads, Tensor v, Tensor v_first, Tensor v0, Tensor v12, bool[4] need)"
        " -> Tensor[]");
  m.def("delta_keys(Tensor k, Tensor k_k, Tensor k_a, Tensor a0, Tensor a12, int heads) -> Tensor[]");
  m.def("delta_keys_backward(Tensor?[] grads, Tensor k, Tensor k_k, Tensor k_a, Tensor a0, Tensor a12, int heads,"
        " bool[5] need) -> Tensor[]");
  m.def("gated_norm(Tensor y, Tensor r, Tensor k, Tensor v, Tensor r_k, Tensor weight, Tensor bias, Tensor g,"
        " float eps) -> Tensor[]");
  m.def("gated_norm_backward(Tensor?[] grads, Tensor y, Tensor r, Tensor k, Tensor v, Tensor r_k, Tensor weight,"
        " Tensor bias, Tensor g, float eps, bool[8] need) -> Tensor[]");
  m.def("relu_squared(Tensor x) -> Tensor");
  m.def("relu_squared_backward(Tensor grad, Tensor out) -> Tensor");
}

TORCH_LIBRARY_IMPL(rwkv_elementwise, CPU, m) {
  m.impl("token_mix", &token_mix);
  m.impl("token_mix_backward", &token_mix_backward);
  m.impl("value_gate", &value_gate);
  m.impl("value_gate_backward", &value_gate_backward);
  m.impl("delta_keys", &delta_keys);
  m.impl("delta_keys_backward", &delta_keys_backward);
  m.impl("gated_norm", &gated_norm);
  m.impl("gated_norm_backward", &gated_norm_backward);
  m.impl("relu_squared", &relu_squared);
  m.impl("relu_squared_backward", &relu_squared_backward);
}
