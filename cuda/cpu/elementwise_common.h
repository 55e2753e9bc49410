// What the parts of elementwise.cpp share: short names, checks of the arguments.
#pragma once

#include <array>

#include "rows.h"

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Grads = c10::List<std::optional<Tensor>>;
using std::optional;
using namespace rows;

template <size_t n>
using Needs = std::array<bool, n>;  // which inputs want a gradient

int64_t width_of(const Tensor& x) { return x.size(-1); }
int64_t rows_of(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

void check_like(const Tensor& x, std::initializer_list<Tensor> others) {
  for (const Tensor& t : others)
    TORCH_CHECK(t.numel() == x.numel() && t.scalar_type() == x.scalar_type() && t.is_cpu(), "activations differ");
}

void check_vectors(int64_t width, std::initializer_list<Tensor> vectors) {
  for (const Tensor& t : vectors)
    TORCH_CHECK(t.numel() == width && t.scalar_type() == at::kFloat && t.is_cpu(), "vectors must be float32 (C)");
}

// The i-th incoming gradient in rows of x, zeros where autograd had none.
Tensor grad_at(const Grads& grads, size_t i, const Tensor& x) {
  const optional<Tensor> g = grads.get(i);
  if (!g.has_value() || !g->defined()) return at::zeros_like(x, at::MemoryFormat::Contiguous);
  check_like(x, {*g});
  return g->contiguous();
}

}  // namespace
