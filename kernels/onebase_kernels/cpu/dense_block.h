// Sixteen outputs of a bfloat16 weight × rows of x.
//
// The weight is read as it lies, [outputs, inputs] row by row: it is the left operand of the tiles, and the activations,
// which are few, are put into the order that the right one needs. Sums are fp32, and the same whatever the rows beside one.
#pragma once

#if defined(__AVX512BF16__)

#include <cstdint>

#include "aligned_vector.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace onebase {

constexpr int64_t BLOCK = 16;    // outputs, and rows of x, of a tile
constexpr int64_t DEPTH = 32;    // inputs of a tile
constexpr int64_t MAX_TILES = 6;  // of rows of x that share one reading of the weight

// x[m, k] as [m / 16][k / 32] tiles of 16 pairs of inputs × 16 rows; rows past m are zero.
inline AlignedVector<BFloat16> transpose_pairs(const BFloat16* x, int64_t m, int64_t k) {
    const int64_t row_tiles = (m + BLOCK - 1) / BLOCK;
    AlignedVector<BFloat16> tiles(row_tiles * BLOCK * k);
    for (int64_t row = 0; row < m; row++)
        for (int64_t i = 0; i < k; i += 2) {
            const int64_t tile = (row / BLOCK) * (k / DEPTH) + i / DEPTH;
            BFloat16* to = tiles.data() + tile * BLOCK * DEPTH + (i % DEPTH) / 2 * 2 * BLOCK + row % BLOCK * 2;
            to[0] = x[row * k + i];
            to[1] = x[row * k + i + 1];
        }
    return tiles;
}

// sums[TILES][16 outputs][16 rows] of one block of outputs.
#if defined(__AMX_BF16__)
template <int TILES>
inline void multiply(const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
#define ONEBASE_EACH_TILE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ONEBASE_ZERO(i) if constexpr (TILES > i) _tile_zero(i);
#define ONEBASE_MULTIPLY(i)                                                                  \
    if constexpr (TILES > i) {                                                               \
        _tile_loadd(7, x_tiles + ((i) * (k / DEPTH) + depth) * BLOCK * DEPTH, 64);           \
        _tile_dpbf16ps(i, 6, 7);                                                             \
    }
#define ONEBASE_STORE(i) if constexpr (TILES > i) _tile_stored(i, sums + (i) * BLOCK * BLOCK, 64);
    ONEBASE_EACH_TILE(ONEBASE_ZERO)
    for (int64_t depth = 0; depth < k / DEPTH; depth++) {
        // Sixteen rows side by side are no stream to the CPU, so it is told what the next block reads.
        for (int64_t row = BLOCK; row < 2 * BLOCK; row++) __builtin_prefetch(weight + row * k + depth * DEPTH);
        _tile_loadd(6, weight + depth * DEPTH, 2 * k);
        ONEBASE_EACH_TILE(ONEBASE_MULTIPLY)
    }
    ONEBASE_EACH_TILE(ONEBASE_STORE)
#undef ONEBASE_EACH_TILE
#undef ONEBASE_ZERO
#undef ONEBASE_MULTIPLY
#undef ONEBASE_STORE
}
#else
template <int TILES>
inline void multiply(const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
    for (int64_t output = 0; output < BLOCK; output++) {
        __m512 total[TILES] = {};
        for (int64_t pair = 0; pair < k / 2; pair++) {
            int32_t two;
            std::memcpy(&two, weight + output * k + 2 * pair, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            for (int tile = 0; tile < TILES; tile++)
                total[tile] = _mm512_dpbf16_ps(
                    total[tile], both, load_raw<__m512bh>(x_tiles + tile * BLOCK * k + pair * 2 * BLOCK));
        }
        for (int tile = 0; tile < TILES; tile++)
            store(sums + (tile * BLOCK + output) * BLOCK, (F32x16)total[tile]);
    }
}
#endif

inline void multiply_block(int tiles, const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
    switch (tiles) {
        case 1: return multiply<1>(weight, x_tiles, k, sums);
        case 2: return multiply<2>(weight, x_tiles, k, sums);
        case 3: return multiply<3>(weight, x_tiles, k, sums);
        case 4: return multiply<4>(weight, x_tiles, k, sums);
        case 5: return multiply<5>(weight, x_tiles, k, sums);
        default: return multiply<6>(weight, x_tiles, k, sums);
    }
}

}  // namespace onebase

#endif
