// WKV-6 on the CPU: wkv56.h with a decay for each token.
#include "wkv56.h"

TORCH_LIBRARY(rwkv_wkv6, m) {
    m.def("forward(Tensor[] inputs, Tensor state, Tensor starts, bool keep) -> Tensor[]");
    m.def("backward(Tensor[] inputs, Tensor[] kept, Tensor starts, Tensor dy, Tensor dlast) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rwkv_wkv6, CPU, m) {
    m.impl("forward", &rwkv::forward<true>);
    m.impl("backward", &rwkv::backward<true>);
}
