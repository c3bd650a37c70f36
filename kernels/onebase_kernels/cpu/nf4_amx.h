// Products of bfloat16 activations and NF4 weights by AMX, 16 rows or more at a time.
#pragma once

#include <algorithm>

#include "amx.h"
#include "nf4_pairs.h"

namespace onebase {

constexpr int64_t M_TILE = 16;   // rows of x of a tile
constexpr int64_t K_TILE = 32;   // inputs of a tile
constexpr int64_t C_TILE = M_TILE * BLOCK_N;

// A tile of codes as two right-hand tiles: [2][16 pairs of inputs][16 outputs][2].
inline void decode_tile(__m512i codebook, const uint8_t* codes, BFloat16* to) {
#pragma GCC unroll 8
    for (int64_t row = 0; row < TILE_ROWS; row++) {
        __builtin_prefetch(codes + row * 64 + BYTES_AHEAD);
        const __m512i packed = _mm512_loadu_si512(codes + row * 64);
        const __m512i pairs[4] = {decode_pair<0>(codebook, packed), decode_pair<1>(codebook, packed),
                                  decode_pair<2>(codebook, packed), decode_pair<3>(codebook, packed)};
        std::memcpy(to + row * 4 * 2 * BLOCK_N, pairs, sizeof pairs);
    }
}

// y[16 rows, 16 outputs]: a tile's products are summed by AMX, then scaled and added up here. Decoding runs one tile
// ahead of the products and scaling one behind, so that none waits for what was only just written.
template <class Y>
void multiply_some(const Nf4Group& group, int64_t block, const BFloat16* x, int64_t m, F32x16 bias, Y* y) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    alignas(64) BFloat16 weights[2][2 * K_TILE * BLOCK_N];
    alignas(64) float products[2][C_TILE];
    F32x16 total[M_TILE], scale{};
    for (auto& sum : total) sum = bias;
    const __m512i codebook = twice((__m256i)narrow(CODEBOOK));
    Scales scales(group, block);
    const auto add_products = [&](int64_t tile) {
#pragma GCC unroll 16
        for (int i = 0; i < M_TILE; i++) total[i] += load(products[tile % 2] + i * BLOCK_N) * scale;
    };
    decode_tile(codebook, codes, weights[0]);
    for (int64_t tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) decode_tile(codebook, codes + (tile + 1) * TILE_BYTES, weights[(tile + 1) % 2]);
        _tile_zero(0);
        _tile_loadd(4, x + tile * BLOCK_K, 2 * k);
        _tile_loadd(6, weights[tile % 2], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + tile * BLOCK_K + K_TILE, 2 * k);
        _tile_loadd(7, weights[tile % 2] + K_TILE * BLOCK_N, 64);
        _tile_dpbf16ps(0, 5, 7);
        if (tile) add_products(tile - 1);
        scale = scales(tile);
        _tile_stored(0, products[tile % 2], 64);
    }
    add_products(tiles - 1);
    for (int64_t i = 0; i < m; i++) store(y + i * group.num_outputs + block * BLOCK_N, total[i]);
}

// ---- many rows: weights are scaled as they are decoded, and all sums stay in AMX's own registers ----------------------

constexpr int64_t MAX_ROW_TILES = 6;  // as many sums as there are registers for, besides the operands'

// Half a tile of codes, scaled, as a right-hand tile.
inline void decode_scaled(const uint8_t* codes, F32x16 scale, BFloat16* to) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 4
    for (int64_t row = 0; row < TILE_ROWS / 2; row++) {
        const U32x16 packed = load_raw<U32x16>(codes + row * 64);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++) {
            const F32x16 even = lookup(CODEBOOK, packed >> (4 * pair)) * scale;
            const F32x16 odd = lookup(CODEBOOK, packed >> (4 * pair + 16)) * scale;
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            _mm512_store_si512(to + (row * 4 + pair) * 2 * BLOCK_N, _mm512_permutexvar_epi16(interleave, halves));
        }
    }
}

// Sums of ROW_TILES tiles of rows and one block of outputs; loops over tiles are unrolled, for AMX's operands are
// constants.
template <int ROW_TILES>
void multiply_row_tiles(const Nf4Group& group, int64_t block, const BFloat16* x, float* sums) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    alignas(64) BFloat16 weights[2][K_TILE * BLOCK_N];
    Scales scales(group, block);
#define ONEBASE_EACH_TILE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ONEBASE_ZERO(i) if constexpr (ROW_TILES > i) _tile_zero(i);
#define ONEBASE_MULTIPLY(i)                              \
    if constexpr (ROW_TILES > i) {                       \
        _tile_loadd(6, inputs + M_TILE * (i) * k, 2 * k); \
        _tile_dpbf16ps(i, 6, 7);                         \
    }
#define ONEBASE_STORE(i) if constexpr (ROW_TILES > i) _tile_stored(i, sums + (i) * C_TILE, 64);
    ONEBASE_EACH_TILE(ONEBASE_ZERO)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const F32x16 scale = scales(tile);
        for (int half = 0; half < 2; half++) {
            decode_scaled(codes + tile * TILE_BYTES + half * TILE_BYTES / 2, scale, weights[half]);
            const BFloat16* inputs = x + tile * BLOCK_K + half * K_TILE;
            _tile_loadd(7, weights[half], 64);
            ONEBASE_EACH_TILE(ONEBASE_MULTIPLY)
        }
    }
    ONEBASE_EACH_TILE(ONEBASE_STORE)
#undef ONEBASE_EACH_TILE
#undef ONEBASE_ZERO
#undef ONEBASE_MULTIPLY
#undef ONEBASE_STORE
}

// y[m, 16 outputs] of m rows of x, m a multiple of 16.
template <class Y>
void multiply_many(const Nf4Group& group, int64_t block, const BFloat16* x, int64_t m, F32x16 bias, Y* y) {
    alignas(64) float sums[MAX_ROW_TILES * C_TILE];
    for (int64_t row = 0; row < m; row += MAX_ROW_TILES * M_TILE) {
        const BFloat16* inputs = x + row * group.num_inputs;
        const int64_t rows = std::min(MAX_ROW_TILES * M_TILE, m - row);
        switch (rows / M_TILE) {
            case 1: multiply_row_tiles<1>(group, block, inputs, sums); break;
            case 2: multiply_row_tiles<2>(group, block, inputs, sums); break;
            case 3: multiply_row_tiles<3>(group, block, inputs, sums); break;
            case 4: multiply_row_tiles<4>(group, block, inputs, sums); break;
            case 5: multiply_row_tiles<5>(group, block, inputs, sums); break;
            default: multiply_row_tiles<6>(group, block, inputs, sums);
        }
        for (int64_t i = 0; i < rows; i++)
            store(y + (row + i) * group.num_outputs + block * BLOCK_N, load(sums + i * BLOCK_N) + bias);
    }
}

}  // namespace onebase
