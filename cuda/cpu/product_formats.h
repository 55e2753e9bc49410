// Matrices by the way in which they are stored, and how registers are filled with their weights. Letters as in
// products.cpp.
//
// A matrix hands out blocks: WIDTH columns of one row, as WIDTH / W registers; `place` is where one begins. `get` is a
// register of weights, `raw` one without the scale that SCALES tells of. Where
// several registers come of one load (UNIT of them), register u has the columns u, UNIT + u, 2 UNIT + u ...: it is x
// that is laid out to fit, once a call.
#pragma once

#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rwkv {
namespace {

constexpr int BLOCK = 64;  // weights of one scale

// Where the scales of weights come in: none that are not in the registers, one for a block, one for a row.
enum Scales { NO_SCALES, BLOCK_SCALES, ROW_SCALES };

// How a matrix is stored, by the numbers of ops/products.py; the first two are those of `Dtype`.
enum Stored { STORED_FLOAT32, STORED_BFLOAT16, STORED_INT8, STORED_FOUR_BIT, STORED_FP8 };

// Columns of x in the order in which registers of weights have them; what fills no unit stays in its place.
template <int UNIT>
INLINE int64_t column(int64_t i, int64_t n) {
    const int64_t begin = i / (UNIT * W) * (UNIT * W), lane = (i - begin) % W, u = (i - begin) / W;
    return begin + UNIT * W > n ? i : begin + lane * UNIT + u;
}

// A matrix of float32.
struct Float32 {
    static constexpr int UNIT = 1, WIDTH = W;
    static constexpr Scales SCALES = NO_SCALES;
    const float* values;
    int64_t n;

    struct Columns {
        const float* at;
        INLINE vec get(int) const { return load(at); }
    };
    INLINE Columns block(int64_t o, int64_t i) const { return {values + o * n + i}; }
    INLINE const void* place(int64_t o, int64_t i) const { return values + o * n + i; }
    template <typename Lanes>
    INLINE vec rest(int64_t o, int64_t i, Lanes lanes) const {
        return load(values + o * n + i, lanes);
    }
};

// A matrix of bfloat16: the upper halves of float32. Each word of 32 bits has two, the even column below.
struct BFloat16 {
    static constexpr int UNIT = 2, WIDTH = 2 * W;
    static constexpr Scales SCALES = NO_SCALES;
    const bf16* values;
    int64_t n;

    struct Columns {
        uvec pairs;
        INLINE vec get(int j) const { return bit_copy<vec>(j == 0 ? pairs << 16 : pairs & 0xffff0000u); }
    };
    INLINE Columns block(int64_t o, int64_t i) const {
        uvec pairs;
        std::memcpy(&pairs, values + o * n + i, sizeof(pairs));
        return {pairs};
    }
    INLINE const void* place(int64_t o, int64_t i) const { return values + o * n + i; }
    template <typename Lanes>
    INLINE vec rest(int64_t o, int64_t i, Lanes lanes) const {
        return load(values + o * n + i, lanes);
    }
};

// Blocks of 64 integers along a row, each with a scale. n is a multiple of 64, here and below.
struct Int8 {
    static constexpr int UNIT = 1, WIDTH = BLOCK;
    static constexpr Scales SCALES = W == 16 ? NO_SCALES : BLOCK_SCALES;  // with what registers there are
    const int8_t* values;
    const float* scales;
    int64_t n;

    struct Columns {
        const int8_t* at;
        float scale;
        INLINE vec raw(int j) const {
#if defined(__AVX512F__)
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + j * W));
            return bit_copy<vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + j * W));
            return bit_copy<vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
            vec x;
            for (int lane = 0; lane < W; ++lane) x[lane] = at[j * W + lane];
            return x;
#endif
        }
        INLINE vec get(int j) const { return scale * raw(j); }
    };
    INLINE float scale(int64_t o, int64_t i) const { return scales[(o * n + i) / BLOCK]; }
    INLINE Columns block(int64_t o, int64_t i) const { return {values + o * n + i, scale(o, i)}; }
    INLINE const void* place(int64_t o, int64_t i) const { return values + o * n + i; }
};

// Blocks of 64 numbers of four bits, the first of two in the upper half of a byte: which of 16 levels, each block with
// a scale.
struct FourBit {
    static constexpr int UNIT = BLOCK / W, WIDTH = BLOCK;
    static constexpr Scales SCALES = NO_SCALES;
    const uint8_t* values;
    const float *scales, *levels;
    int64_t n;

    INLINE const void* place(int64_t o, int64_t i) const { return values + (o * n + i) / 2; }

    // A lane has UNIT numbers: where the j-th lies.
    static INLINE int shift(int j) { return j / 2 * 8 + (j % 2 ? 0 : 4); }

#if defined(__AVX512F__)
    struct Columns {
        __m512i words;
        __m512 table;
        INLINE vec get(int j) const {
            return bit_copy<vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(words, shift(j)), table));
        }
    };
    INLINE Columns block(int64_t o, int64_t i) const {
        const int64_t at = o * n + i;
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at / 2));
        return {_mm512_cvtepu16_epi32(words), bit_copy<__m512>(scales[at / BLOCK] * load(levels))};
    }
#elif defined(__AVX2__)
    struct Columns {
        __m256i words;
        __m256 low, high;
        INLINE vec get(int j) const {
            const __m256i number = _mm256_srli_epi32(words, shift(j));
            const __m256 upper =
                _mm256_castsi256_ps(_mm256_slli_epi32(number, 28));  // its sign: one of the upper eight
            return bit_copy<vec>(
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, number), _mm256_permutevar8x32_ps(high, number), upper));
        }
    };
    INLINE Columns block(int64_t o, int64_t i) const {
        const int64_t at = o * n + i;
        const float scale = scales[at / BLOCK];
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at / 2)),
                bit_copy<__m256>(scale * load(levels)), bit_copy<__m256>(scale * load(levels + W))};
    }
#else
    struct Columns {
        const uint8_t* at;
        float scale;
        const float* levels;
        INLINE vec get(int j) const {
            vec x;
            for (int lane = 0; lane < W; ++lane) {
                const int pair = at[(lane * UNIT + j) / 2];
                x[lane] = levels[j % 2 ? pair & 15 : pair >> 4];
            }
            return scale * x;
        }
    };
    INLINE Columns block(int64_t o, int64_t i) const {
        const int64_t at = o * n + i;
        return {values + at / 2, scales[at / BLOCK], levels};
    }
#endif
};

// Floats of eight bits (e4m3), each row with a scale. Sign and the other seven bits are put where float16 has them; its
// exponent counts from -15 instead of -7, so the numbers come out 2^-8 times as large, also the subnormal ones.
struct Fp8 {
    static constexpr int UNIT = 1, WIDTH = BLOCK;
    static constexpr Scales SCALES = ROW_SCALES;
    const uint8_t* values;
    const float* scales;
    int64_t n;

    struct Columns {
        const uint8_t* at;
        float scale;
        INLINE vec raw(int j) const {
#if defined(__AVX512F__)
            const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + j * W)));
            const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(~0x4000));
            return bit_copy<vec>(_mm512_cvtph_ps(half));
#elif defined(__AVX2__)
            const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + j * W)));
            const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(~0x4000));
            return bit_copy<vec>(_mm256_cvtph_ps(half));
#else
            vec x;
            for (int lane = 0; lane < W;
                 ++lane) {  // as a normal number of float32, from which what is too much is taken
                const uint32_t bits = at[j * W + lane], rest = bits & 0x7f;
                const uint32_t tiny = rest < 8;
                const float size = bit_copy<float>((rest << 20) + ((112 + tiny) << 23)) - (tiny ? 0x1p-14f : 0.f);
                x[lane] = bits & 0x80 ? -size : size;
            }
            return x;
#endif
        }
        INLINE vec get(int j) const { return scale * raw(j); }
    };
    INLINE float scale(int64_t o, int64_t) const { return scales[o] * 256.f; }
    INLINE Columns block(int64_t o, int64_t i) const { return {values + o * n + i, scale(o, i)}; }
    INLINE const void* place(int64_t o, int64_t i) const { return values + o * n + i; }
};

// f(the matrix) of n columns, by how it is stored. levels: what numbers of four bits stand for.
template <typename F>
void with_matrix(int64_t stored, const void* weights, const float* scales, const float* levels, int64_t n, const F& f) {
    const auto* bytes = static_cast<const uint8_t*>(weights);
    switch (stored) {
        case STORED_BFLOAT16:
            return f(BFloat16{static_cast<const bf16*>(weights), n});
        case STORED_INT8:
            return f(Int8{static_cast<const int8_t*>(weights), scales, n});
        case STORED_FOUR_BIT:
            return f(FourBit{bytes, scales, levels, n});
        case STORED_FP8:
            return f(Fp8{bytes, scales, n});
        default:
            return f(Float32{static_cast<const float*>(weights), n});
    }
}

}  // namespace
}  // namespace rwkv
