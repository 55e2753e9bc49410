// Products of many rows by the matrix unit of newer Intel processors (AMX): 16 rows of W, stored as bfloat16 or as
// numbers of eight bits, which bfloat16 holds exactly, by 16 rows of x at once. Letters as in products.cpp.
//
// x is the sum of three bfloat16, eight bits of its significand each, so nothing of it is lost. A tile sums 32 columns
// by themselves, then adds the sum to what is there.
#pragma once

#include "product_formats.h"

namespace rwkv {
namespace {

constexpr int64_t MOST = 128;  // rows of x that one task takes, where it takes several
constexpr int64_t STRIP = 16;  // rows of W, or of x, of one tile
// rows of W of a block of tiles: their sums take turns, as one takes its time to arrive
constexpr int64_t TILED_TALL = 3 * STRIP;

#if defined(__AMX_BF16__)

constexpr int64_t STEP = 32;            // columns of one tile
constexpr int64_t PARTS = 3;            // of x
constexpr int64_t PART = STEP * STRIP;  // numbers of a tile of x

// The instructions, as the compilers' own functions do not say what memory they read.
#define TILE_LOAD(tile, from, stride) /* stride in bytes, here and below */ \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_ADD(sums, w, x) asm volatile("tdpbf16ps %%tmm" #x ", %%tmm" #w ", %%tmm" #sums::)
#define TILE_CLEAR(tile) asm volatile("tilezero %%tmm" #tile::)

// Numbers of 16 bits that 16 rows of x take.
inline int64_t strip_size(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK * STRIP * PARTS; }

// `rows` rows of x, at most 16: to[step][part][pair of columns][row][2], zeros where there are none.
inline void lay_out_strip(const float* x, int64_t rows, int64_t n, uint16_t* to) {
    std::memset(to, 0, strip_size(n) * sizeof(*to));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i) {
            float rest = x[r * n + i];
            uint16_t* at = to + i / STEP * PARTS * PART + (i % STEP / 2 * STRIP + r) * 2 + i % 2;
            for (int p = 0; p < PARTS; ++p) {
                const uint32_t upper = bit_copy<uint32_t>(rest) & 0xffff0000u;
                at[p * PART] = static_cast<uint16_t>(upper >> 16);
                rest -= bit_copy<float>(upper);
            }
        }
}

// The shapes of this thread's tiles, for as long as it lives; then those that it found are there again: PyTorch's
// libraries have tiles too.
class TileShapes {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {};  // of a row
        uint8_t rows[16] = {};
    } found;

  public:
    TileShapes() {
        asm volatile("sttilecfg %0" : "=m"(found));
        Shapes own;
        for (int tile = 0; tile < 8; ++tile) own.rows[tile] = 16, own.bytes[tile] = 64;
        asm volatile("ldtilecfg %0" ::"m"(own));
    }
    ~TileShapes() {
        if (found.palette)
            asm volatile("ldtilecfg %0" ::"m"(found));
        else
            asm volatile("tilerelease" ::);
    }
};

// Tiles 0 to 2 += 48 rows of W, `stride` bytes apart, times a strip of x, 64 columns of both.
INLINE void multiply(const void* w, int64_t stride, const uint16_t* x) {
#pragma GCC unroll 2
    for (int64_t step = 0; step < BLOCK / STEP; ++step) {
        const char* from = static_cast<const char*>(w) + step * STEP * 2;
        const uint16_t* columns = x + step * PARTS * PART;
        TILE_LOAD(3, from, stride);
        TILE_LOAD(4, from + STRIP * stride, stride);
        TILE_LOAD(5, from + 2 * STRIP * stride, stride);
        TILE_LOAD(6, columns, 64);
        TILE_ADD(0, 3, 6);
        TILE_ADD(1, 4, 6);
        TILE_ADD(2, 5, 6);
        TILE_LOAD(7, columns + PART, 64);
        TILE_ADD(0, 3, 7);
        TILE_ADD(1, 4, 7);
        TILE_ADD(2, 5, 7);
        TILE_LOAD(6, columns + 2 * PART, 64);
        TILE_ADD(0, 3, 6);
        TILE_ADD(1, 4, 6);
        TILE_ADD(2, 5, 6);
    }
}

INLINE void clear_sums() {
    TILE_CLEAR(0);
    TILE_CLEAR(1);
    TILE_CLEAR(2);
}

INLINE void store_sums(float* to, int64_t stride) {  // stride in numbers
    TILE_STORE(0, to, stride * 4);
    TILE_STORE(1, to + STRIP * stride, stride * 4);
    TILE_STORE(2, to + 2 * STRIP * stride, stride * 4);
}

// y[o][r] = row `first + o` of W, of which there are `tall` (at most TILED_TALL), times row r of `strips` strips of x.
inline void block_product(const BFloat16& matrix, const uint16_t* x, int64_t strips, int64_t first, int64_t tall,
                          float* y) {
    alignas(64) uint16_t w[TILED_TALL * BLOCK];  // where rows of W or of its columns are too few
    const int64_t n = matrix.n;
    for (int64_t strip = 0; strip < strips; ++strip) {
        clear_sums();
        for (int64_t i = 0; i < n; i += BLOCK, x += BLOCK * STRIP * PARTS) {
            const int64_t count = std::min<int64_t>(BLOCK, n - i);
            if (tall == TILED_TALL && count == BLOCK) {
                multiply(matrix.place(first, i), n * 2, x);
                continue;
            }
            std::memset(w, 0, sizeof(w));
            for (int64_t o = 0; o < tall; ++o) std::memcpy(w + o * BLOCK, matrix.place(first + o, i), count * 2);
            multiply(w, BLOCK * 2, x);
        }
        store_sums(y + strip * STRIP, MOST);
    }
}

// 64 columns of `tall` rows of W as bfloat16, without their scales.
template <typename Matrix>
void as_bfloat16(const Matrix& matrix, int64_t first, int64_t tall, int64_t i, uint16_t* to) {
    for (int64_t o = 0; o < tall; ++o) {
        const auto columns = matrix.block(first + o, i);
#pragma GCC unroll 2
        for (int j = 0; j < BLOCK / W; j += 2) {
            const auto low = bit_copy<__m512>(columns.raw(j)), high = bit_copy<__m512>(columns.raw(j + 1));
            const auto both = _mm512_cvtne2ps_pbh(high, low);
            std::memcpy(to + o * BLOCK + j * W, &both, sizeof(both));
        }
    }
}

// The same where weights have scales, which their sums are multiplied by. Several blocks of columns are converted
// ahead: tiles are not loaded from what is still on its way to the cache.
template <typename Matrix>
void block_product(const Matrix& matrix, const uint16_t* x, int64_t strips, int64_t first, int64_t tall, float* y) {
    constexpr int64_t AHEAD = 4;
    alignas(64) uint16_t w[AHEAD][TILED_TALL * BLOCK] = {};
    alignas(64) float sums[AHEAD][TILED_TALL * STRIP];
    std::memset(y, 0, TILED_TALL * MOST * sizeof(*y));
    const int64_t size = strip_size(matrix.n);
    for (int64_t begin = 0; begin < matrix.n; begin += AHEAD * BLOCK) {
        const int64_t blocks = std::min(AHEAD, (matrix.n - begin) / BLOCK);
        for (int64_t b = 0; b < blocks; ++b) as_bfloat16(matrix, first, tall, begin + b * BLOCK, w[b]);
        for (int64_t strip = 0; strip < strips; ++strip) {
            for (int64_t b = 0; b < blocks; ++b) {
                clear_sums();
                multiply(w[b], BLOCK * 2, x + strip * size + (begin + b * BLOCK) * STRIP * PARTS);
                store_sums(sums[b], STRIP);
            }
            for (int64_t o = 0; o < tall; ++o) {
                float* to = y + o * MOST + strip * STRIP;
                vec total = load(to);
                for (int64_t b = 0; b < blocks; ++b)
                    total += matrix.scale(first + o, begin + b * BLOCK) * load(sums[b] + o * STRIP);
                store(to, total);
            }
        }
    }
}

#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_ADD
#undef TILE_CLEAR
#endif

}  // namespace
}  // namespace rwkv
