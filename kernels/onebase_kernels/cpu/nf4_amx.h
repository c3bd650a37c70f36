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

// ---- many rows: weights are decoded and scaled once for all of them, and all sums stay in AMX's registers -------------

constexpr int64_t DECODED_BYTES = 512 << 10;  // of weights at a time, for the second cache

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

// A block of outputs as right-hand tiles, one for every 32 inputs.
inline void decode_block(const Nf4Group& group, int64_t block, BFloat16* to) {
    const int64_t tiles = group.num_inputs / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    Scales scales(group, block);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const F32x16 scale = scales(tile);
        for (int64_t half = 0; half < 2; half++, codes += TILE_BYTES / 2, to += K_TILE * BLOCK_N)
            decode_scaled(codes, scale, to);
    }
}

// Products of up to 32 rows and two blocks of outputs, on their way to y.
template <class Y>
struct Products {
    alignas(64) float sums[2][2][C_TILE];  // of each tile of rows and each block
    int64_t rows = 0, blocks = 0;
    const BFloat16* bias;  // at the first output, or null
    Y* y;                  // at the first row and output

    void finish(int64_t y_stride) const {
        for (int64_t block = 0; block < blocks; block++) {
            const F32x16 start = load_bias(bias, block);
            for (int64_t row = 0; row < rows; row++)
                store(y + row * y_stride + block * BLOCK_N,
                      load(sums[row / M_TILE][block] + row % M_TILE * BLOCK_N) + start);
        }
    }
};

// One tile of rows or two, times one block or two; AMX's operands are constants, hence the spelled out cases. `previous`
// is finished meanwhile, for what AMX stores can be loaded only long after.
template <int ROW_TILES, int BLOCKS, class Y>
void multiply_tiles(const BFloat16* x, int64_t k, const BFloat16* weights, Products<Y>& products,
                    const Products<Y>& previous, int64_t y_stride) {
    const BFloat16* second = weights + k * BLOCK_N;
    _tile_zero(0);
    if constexpr (BLOCKS > 1) _tile_zero(1);
    if constexpr (ROW_TILES > 1) _tile_zero(2);
    if constexpr (ROW_TILES > 1 && BLOCKS > 1) _tile_zero(3);
    for (int64_t input = 0; input < k; input += K_TILE) {
        _tile_loadd(4, x + input, 2 * k);
        _tile_loadd(6, weights + input * BLOCK_N, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (BLOCKS > 1) {
            _tile_loadd(7, second + input * BLOCK_N, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROW_TILES > 1) {
            _tile_loadd(5, x + M_TILE * k + input, 2 * k);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (ROW_TILES > 1 && BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
    }
    previous.finish(y_stride);
    _tile_stored(0, products.sums[0][0], 64);
    if constexpr (BLOCKS > 1) _tile_stored(1, products.sums[0][1], 64);
    if constexpr (ROW_TILES > 1) _tile_stored(2, products.sums[1][0], 64);
    if constexpr (ROW_TILES > 1 && BLOCKS > 1) _tile_stored(3, products.sums[1][1], 64);
}

// y[m rows, outputs of some blocks] of x, readable in whole tiles of rows, and weights from decode_block; all pointers at
// the first row and output.
template <class Y>
void multiply_many(const BFloat16* x, int64_t m, int64_t k, const BFloat16* weights, int64_t num_blocks,
                   const BFloat16* bias, Y* y, int64_t y_stride) {
    Products<Y> both[2];
    int64_t turn = 0;
    for (int64_t row = 0; row < m; row += 2 * M_TILE)
        for (int64_t block = 0; block < num_blocks; block += 2, turn++) {
            Products<Y>&now = both[turn % 2], &previous = both[(turn + 1) % 2];
            now.rows = std::min(2 * M_TILE, m - row);
            now.blocks = std::min<int64_t>(2, num_blocks - block);
            now.bias = bias ? bias + block * BLOCK_N : nullptr;
            now.y = y + row * y_stride + block * BLOCK_N;
            const auto multiply = [&]<int ROW_TILES, int BLOCKS>() {
                multiply_tiles<ROW_TILES, BLOCKS>(x + row * k, k, weights + block * BLOCK_N * k, now, previous, y_stride);
            };
            if (now.rows > M_TILE && now.blocks == 2) multiply.template operator()<2, 2>();
            else if (now.rows > M_TILE) multiply.template operator()<2, 1>();
            else if (now.blocks == 2) multiply.template operator()<1, 2>();
            else multiply.template operator()<1, 1>();
        }
    both[(turn + 1) % 2].finish(y_stride);
}

}  // namespace onebase
