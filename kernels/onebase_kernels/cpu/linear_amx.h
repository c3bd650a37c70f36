// Products of up to 16 rows of bfloat16 and 4-bit weights by AMX; and 4-bit weights as linear_many.h wants them.
#pragma once

#include <algorithm>

#include "linear_many.h"
#include "linear_pairs.h"

namespace onebase {

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

// y[m, 16 outputs] of up to 16 rows of x, readable as a whole tile: a tile's products are summed by AMX, then scaled and
// added up here. Decoding runs one tile ahead of the products and scaling one behind, so that none waits for what was only
// just written.
template <class Group, class Y>
void multiply_some(const Group& group, int64_t block, const BFloat16* x, int64_t m,
                   const Starts<Group, BFloat16>& starts, FetchAhead& fetch, Y* y) {
    constexpr int64_t BLOCK_K = Group::BLOCK_K;
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES<Group>;
    alignas(64) BFloat16 weights[2][BLOCK_K * BLOCK_N];
    alignas(64) float products[2][C_TILE];
    F32x16 total[M_TILE], scale{};
    starts.set(total, block, 0);
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

// ---- many rows -------------------------------------------------------------------------------------------------------

// 32 inputs as a right-hand tile of weights; `decoder` makes these of what codes stand for.
template <class Decoder>
inline void decode_weights(F32x16 codebook, const uint8_t* codes, Decoder decoder, BFloat16* to) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 4
    for (int64_t row = 0; row < K_TILE / ROW_INPUTS; row++) {
        __builtin_prefetch(codes + row * ROW_BYTES + BYTES_AHEAD);
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

}  // namespace onebase
