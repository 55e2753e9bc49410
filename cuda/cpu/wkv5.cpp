// WKV-5.2 on the CPU: wkv56.h with one decay for all tokens.
#include "wkv56.h"

TORCH_LIBRARY(rwkv_wkv5, m) {
    m.def("forward(Tensor[] inputs, Tensor state, Tensor starts, bool keep) -> Tensor[]");
    m.def("backward(Tensor[] inputs, Tensor[] kept, Tensor starts, Tensor dy, Tensor dlast) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rwkv_wkv5, CPU, m) {
    m.impl("forward", &rwkv::forward<false>);
    m.impl("backward", &rwkv::backward<false>);
}
