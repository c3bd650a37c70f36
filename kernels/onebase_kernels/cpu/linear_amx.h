// Products of bfloat16 activations and 4-bit weights by AMX, 16 rows or more at a time.
#pragma once

#include <algorithm>

#include "amx.h"
#include "linear_pairs.h"

namespace onebase {

constexpr int64_t M_TILE = 16;   // rows of x of a tile
constexpr int64_t K_TILE = 32;   // inputs of a tile
constexpr int64_t C_TILE = M_TILE * BLOCK_N;

// A tile of codes as one or two right-hand tiles: [2][16 pairs of inputs][16 outputs][2].
template <class Group>
[[gnu::always_inline]] inline void decode_tile(__m512i codebook, const uint8_t* codes, BFloat16* to) {
#pragma GCC unroll 8
    for (int64_t row = 0; row < TILE_ROWS<Group>; row++) {
        __builtin_prefetch(codes + row * ROW_BYTES + BYTES_AHEAD);
        const __m512i packed = _mm512_loadu_si512(codes + row * ROW_BYTES);
        const __m512i pairs[4] = {decode_pair<0>(codebook, packed), decode_pair<1>(codebook, packed),
                                  decode_pair<2>(codebook, packed), decode_pair<3>(codebook, packed)};
        std::memcpy(to + row * 4 * 2 * BLOCK_N, pairs, sizeof pairs);
    }
}

// y[m of 16 rows, 16 outputs] of the rows of x from `row` on, which `x` and `y` point to: a tile's products are summed by AMX, then scaled and added up here. Decoding runs one tile
// ahead of the products and scaling one behind, so that none waits for what was only just written.
template <class Group, class Y>
void multiply_some(const Group& group, int64_t block, const BFloat16* x, int64_t row, int64_t m,
                   const Starts<Group, BFloat16>& starts, FetchAhead& fetch, Y* y) {
    constexpr int64_t BLOCK_K = Group::BLOCK_K;
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES<Group>;
    alignas(64) BFloat16 weights[2][BLOCK_K * BLOCK_N];
    alignas(64) float products[2][C_TILE];
    F32x16 total[M_TILE], scale{};
    starts.set(total, block, row);
    const __m512i codebook = twice((__m256i)narrow(group.codebook()));
    Scales<Group> scales(group, block);
    const auto add_products = [&](int64_t tile) {
#pragma GCC unroll 16
        for (int i = 0; i < M_TILE; i++) total[i] += load(products[tile % 2] + i * BLOCK_N) * scale;
    };
    decode_tile<Group>(codebook, codes, weights[0]);
    for (int64_t tile = 0; tile < tiles; tile++) {
        fetch();
        if (tile + 1 < tiles)
            decode_tile<Group>(codebook, codes + (tile + 1) * TILE_BYTES<Group>, weights[(tile + 1) % 2]);
        _tile_zero(0);
        _tile_loadd(4, x + tile * BLOCK_K, 2 * k);
        _tile_loadd(6, weights[tile % 2], 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (BLOCK_K > K_TILE) {
            _tile_loadd(5, x + tile * BLOCK_K + K_TILE, 2 * k);
            _tile_loadd(7, weights[tile % 2] + K_TILE * BLOCK_N, 64);
            _tile_dpbf16ps(0, 5, 7);
        }
        if (tile) add_products(tile - 1);
        scale = scales(tile);
        _tile_stored(0, products[tile % 2], 64);
    }
    add_products(tiles - 1);
    for (int64_t i = 0; i < m; i++) store(y + i * group.num_outputs + block * BLOCK_N, total[i]);
}

// ---- many rows: weights are decoded and scaled once for all of them, and all sums stay in AMX's registers -------------

constexpr int64_t DECODED_BYTES = 512 << 10;  // of weights at a time, for the second cache

// 32 inputs as a right-hand tile of weights; `decoder` makes these of what codes stand for.
template <class Decoder>
inline void decode_weights(F32x16 codebook, const uint8_t* codes, Decoder decoder, BFloat16* to) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 4
    for (int64_t row = 0; row < K_TILE / ROW_INPUTS; row++) {
        const U32x16 packed = load_raw<U32x16>(codes + row * ROW_BYTES);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++) {
            const F32x16 even = decoder(lookup(codebook, packed >> (4 * pair)));
            const F32x16 odd = decoder(lookup(codebook, packed >> (4 * pair + 16)));
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            _mm512_store_si512(to + (row * 4 + pair) * 2 * BLOCK_N, _mm512_permutexvar_epi16(interleave, halves));
        }
    }
}

// A block of outputs as right-hand tiles, one for every 32 inputs.
template <class Group>
void decode_block(const Group& group, int64_t block, BFloat16* to) {
    const int64_t tiles = group.num_inputs / Group::BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES<Group>;
    const F32x16 codebook = group.codebook();
    Scales<Group> scales(group, block);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const auto decoder = scales.decoder(tile);
        for (int64_t input = 0; input < Group::BLOCK_K; input += K_TILE, to += K_TILE * BLOCK_N) {
            decode_weights(codebook, codes, decoder, to);
            codes += K_TILE / ROW_INPUTS * ROW_BYTES;
        }
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
