// bfloat16 for CPUs and GPUs alike: its bits, and the one way in which a float is rounded to it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__) || defined(__HIP__)
#define EVERYWHERE __host__ __device__ __forceinline__
#else
#define EVERYWHERE inline __attribute__((always_inline))
#endif

namespace rwkv {

struct bf16 {
    uint16_t bits;
};

constexpr float LOG2E = 1.44269504f;
constexpr float DECAY_RATE = 0.60653066f;  // exp(-1/2): the log decay of WKV-7 is -DECAY_RATE sigmoid(w)

template <typename To, typename From>
EVERYWHERE To bit_copy(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "two types of one size");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

EVERYWHERE float widen(float x) { return x; }
EVERYWHERE float widen(bf16 x) { return bit_copy<float>((uint32_t)x.bits << 16); }

EVERYWHERE void narrow(float x, float& to) { to = x; }
// Nearest, ties to even. A NaN keeps its upper bits and is made quiet, as rounding could carry it into infinity.
EVERYWHERE void narrow(float x, bf16& to) {
    const uint32_t bits = bit_copy<uint32_t>(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = (uint16_t)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace rwkv
