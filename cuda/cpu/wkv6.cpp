// WKV-6 on the CPU: wkv56.h with a decay for each token.
#include "wkv56.h"

RWKV_PUBLIC int64_t rwkv_interval() { return rwkv::INTERVAL; }

RWKV_EXPORT rwkv_forward(void* const* tensors, const int64_t* sizes, int dtype, int threads) {
    return rwkv::forward56<true>(tensors, sizes, dtype, threads);
}

RWKV_EXPORT rwkv_backward(void* const* tensors, const int64_t* sizes, int dtype, int threads) {
    return rwkv::backward56<true>(tensors, sizes, dtype, threads);
}
