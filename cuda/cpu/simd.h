// Vectors of float as the compiler's own vector types: one source for AVX-512, AVX2, SSE2 and NEON, by GCC or clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../numbers.h"

namespace rwkv {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of one register
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));

// GCC before 12 has its own name for the shuffle.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#else
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

#define INLINE inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - vec{}; }

INLINE vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

INLINE vec load(const bf16* p) {
    hvec x;
    std::memcpy(&x, p, sizeof(x));
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
    typedef int16_t words __attribute__((vector_size(16)));
    // one instruction, of which GCC 12 makes five
    return bit_copy<vec>(bit_copy<uvec>(__builtin_ia32_pmovzxwd256(bit_copy<words>(x))) << 16);
#else
    return bit_copy<vec>(__builtin_convertvector(x, uvec) << 16);
#endif
}

// Nothing can be assumed of what a store through memcpy changes: loops keep what they read in variables of their own,
// as the compiler would otherwise read pointers again. (Stores of a vector type spare it that, but GCC 12 then makes
// forward loops of wkv7 that are 15 to 35 % slower.)
INLINE void store(float* p, vec x) { std::memcpy(p, &x, sizeof(x)); }

INLINE void store(bf16* p, vec x) {  // as `narrow` of numbers.h
    const uvec bits = bit_copy<uvec>(x), rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    const uvec upper = (x == x ? rounded : quiet) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
    typedef int32_t half __attribute__((vector_size(16)));
    half parts[2];
    std::memcpy(parts, &upper, sizeof(upper));
    const hvec y = bit_copy<hvec>(__builtin_ia32_packusdw128(parts[0], parts[1]));
#else
    const hvec y = __builtin_convertvector(upper, hvec);
#endif
    std::memcpy(p, &y, sizeof(y));
}

// A whole register, or the first `count` < W lanes of one: the end of a row that fills no register.
struct Whole {};
struct Part {
    int count;
};

template <typename T>
INLINE vec load(const T* p, Whole) {
    return load(p);
}

template <typename T>
INLINE vec load(const T* p, Part part) {  // zeros in the other lanes
    T lanes[W] = {};
    std::memcpy(lanes, p, part.count * sizeof(T));
    return load(lanes);
}

template <typename T>
INLINE void store(T* p, vec x, Whole) {
    store(p, x);
}

template <typename T>
INLINE void store(T* p, vec x, Part part) {
    T lanes[W];
    store(lanes, x);
    std::memcpy(p, lanes, part.count * sizeof(T));
}

INLINE vec zeros_after(vec x, Whole) { return x; }
INLINE vec zeros_after(vec x, Part part) {
    float lanes[W];
    store(lanes, x);
    return load(lanes, part);
}

// f(index, Whole or Part) for each register of n numbers.
template <typename F>
INLINE void each(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, Whole{});
    if (i < n) f(i, Part{static_cast<int>(n - i)});
}

// The sum of all lanes, by halves.
INLINE float sum(vec x) {
    typedef float quad __attribute__((vector_size(16)));
    quad parts[W / 4];
    std::memcpy(parts, &x, sizeof(x));
    for (int half = W / 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

INLINE vec sqrt(vec x) {
    float lanes[W];
    store(lanes, x);
    for (float& lane : lanes) lane = std::sqrt(lane);
    return load(lanes);
}

// Ask for the memory of n elements ahead of their use.
template <typename T>
INLINE void prefetch(const T* p, int n) {
    for (int i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// exp within 2 ulp, for x in [-87.3, 88]; NaN stays NaN.
INLINE vec exp_in_range(vec x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    vec shifted = x * 1.44269504088896f + magic;
    vec n = shifted - magic;
    vec f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vec p = splat(1.f / 5040);
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = p * f + c;
    uvec power = (bit_copy<uvec>(shifted) - bit_copy<uint32_t>(magic) + 127) << 23;
    return p * bit_copy<vec>(power);
}

// exp; results beyond e^+-87 are held there.
INLINE vec exp(vec x) {
    x = x > 87.f ? splat(87.f) : x;
    x = x < -87.f ? splat(-87.f) : x;
    return exp_in_range(x);
}

// exp of x <= 0, exactly 0 where `exp` would hold on to e^-87: for decays and weights.
INLINE vec exp_decay(vec x) { return x < -87.f ? splat(0) : exp_in_range(x); }

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exp(-x)); }

// 0 instead of numbers so small that their products are denormal, which are slow; NaN stays NaN.
INLINE vec flushed(vec x) { return (x < 1e-30f) & (x > -1e-30f) ? splat(0) : x; }

// Exchange blocks of D lanes: low = a's even blocks between b's, high = the odd ones. D = W/2, W/4 ... 1 in turn,
// over rows W/2, W/4 ... 1 apart, transposes a W x W tile.
template <int D>
INLINE void interleave(vec a, vec b, vec& low, vec& high) {
#define PICK(i) ((((i) / D) & 1) ? W + (i) - D : (i))
#if defined(__AVX512F__)
    low = SHUFFLE(a, b, PICK(0), PICK(1), PICK(2), PICK(3), PICK(4), PICK(5), PICK(6), PICK(7), PICK(8), PICK(9),
                  PICK(10), PICK(11), PICK(12), PICK(13), PICK(14), PICK(15));
    high = SHUFFLE(a, b, D + PICK(0), D + PICK(1), D + PICK(2), D + PICK(3), D + PICK(4), D + PICK(5), D + PICK(6),
                   D + PICK(7), D + PICK(8), D + PICK(9), D + PICK(10), D + PICK(11), D + PICK(12), D + PICK(13),
                   D + PICK(14), D + PICK(15));
#elif defined(__AVX__)
    low = SHUFFLE(a, b, PICK(0), PICK(1), PICK(2), PICK(3), PICK(4), PICK(5), PICK(6), PICK(7));
    high = SHUFFLE(a, b, D + PICK(0), D + PICK(1), D + PICK(2), D + PICK(3), D + PICK(4), D + PICK(5), D + PICK(6),
                   D + PICK(7));
#else
    low = SHUFFLE(a, b, PICK(0), PICK(1), PICK(2), PICK(3));
    high = SHUFFLE(a, b, D + PICK(0), D + PICK(1), D + PICK(2), D + PICK(3));
#endif
#undef PICK
}

// Lane i of the result is the sum of the lanes of x[i]; x[0..W) is overwritten.
template <int D = W / 2>
INLINE vec row_sums(vec* x) {
    if constexpr (D == 0) {
        return x[0];
    } else {
        for (int i = 0; i < D; ++i) {
            vec low, high;
            interleave<D>(x[i], x[i + D], low, high);
            x[i] = low + high;
        }
        return row_sums<D / 2>(x);
    }
}

template <int D = W / 2>
INLINE void transpose_registers(vec* x) {
    if constexpr (D > 0) {
        for (int block = 0; block < W; block += 2 * D)
            for (int i = block; i < block + D; ++i) interleave<D>(x[i], x[i + D], x[i], x[i + D]);
        transpose_registers<D / 2>(x);
    }
}

// to[c][r] = from[r][c] for rows x cols, both multiples of W.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows, int cols) {
    for (int r = 0; r < rows; r += W)
        for (int c = 0; c < cols; c += W) {
            vec x[W];
            for (int i = 0; i < W; ++i) x[i] = load(from + (r + i) * from_stride + c);
            transpose_registers(x);
            for (int i = 0; i < W; ++i) store(to + (c + i) * to_stride + r, x[i]);
        }
}

}  // namespace rwkv
