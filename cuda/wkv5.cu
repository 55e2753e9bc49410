// WKV-5.2 on a GPU: cuda/wkv56.h with a decay that all tokens share.
#include "wkv56.h"

RWKV_PUBLIC int64_t rwkv_interval() { return rwkv::INTERVAL; }

RWKV_EXPORT rwkv_forward(void* const* tensors, const int64_t* sizes, int dtype, int device, void* stream) {
    return rwkv::forward56<false>(tensors, rwkv::sizes_of(sizes), dtype, device, stream);
}

RWKV_EXPORT rwkv_backward(void* const* tensors, const int64_t* sizes, int dtype, int device, void* stream) {
    return rwkv::backward56<false>(tensors, rwkv::sizes_of(sizes), dtype, device, stream);
}
