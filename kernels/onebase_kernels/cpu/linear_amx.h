// Products of bfloat16 activations and 4-bit weights by AMX, 16 rows at a time.
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

// ---- more rows: a tile of weights is decoded once for all of them, and its products are scaled ----------------------

constexpr int64_t MAX_ROW_TILES = 6;  // whose sums the first cache holds

// Up to MAX_ROW_TILES tiles of rows times one or two blocks of outputs. As in multiply_some, decoding runs ahead of the
// products and scaling behind them.
template <class Group, int BLOCKS>
class TileProducts {
    static constexpr int64_t BLOCK_K = Group::BLOCK_K;

public:
    // Row tile t lies at x[t]; rows lie num_inputs apart.
    TileProducts(const Group& group, int64_t block, const BFloat16* const* x, int64_t row_tiles)
        : k_(group.num_inputs), x_(x), row_tiles_(row_tiles), codebook_(twice((__m256i)narrow(group.codebook()))),
          codes_{codes(group, block), codes(group, block + BLOCKS - 1)},
          scales_{{group, block}, {group, block + BLOCKS - 1}} {}

    // The sums before the first product, [16 rows, 16 outputs] of a tile of rows and a block; afterwards, of all.
    F32x16 (&totals(int64_t row_tile, int64_t block))[M_TILE] { return totals_[row_tile][block]; }

    void run(FetchAhead& fetch) {
        const int64_t tiles = k_ / BLOCK_K;
        decode(0);
        for (int64_t tile = 0; tile < tiles; tile++) {
            fetch();
            if (tile + 1 < tiles) decode(tile + 1);
            for (int64_t row_tile = 0; row_tile < row_tiles_; row_tile += 2) {
                if (row_tile + 1 < row_tiles_) multiply<2>(tile, row_tile);
                else multiply<1>(tile, row_tile);
            }
        }
        add_products();
    }

private:
    static const uint8_t* codes(const Group& group, int64_t block) {
        return group.codes + block * (group.num_inputs / BLOCK_K) * TILE_BYTES<Group>;
    }

    void decode(int64_t tile) {
        for (int block = 0; block < BLOCKS; block++)
            decode_tile<Group>(codebook_, codes_[block] + tile * TILE_BYTES<Group>, weights_[tile % 2][block]);
    }

    // A tile of weights times one tile of rows or two; the products before these are added up meanwhile.
    template <int ROW_TILES>
    [[gnu::always_inline]] void multiply(int64_t tile, int64_t row_tile) {
        using Sums = TileSums<ROW_TILES, BLOCKS>;
        const auto& weights = weights_[tile % 2];
        Sums::zero();
        for (int64_t input = 0; input < BLOCK_K; input += K_TILE) {
            const int64_t at = tile * BLOCK_K + input, weight = input * BLOCK_N;
            Sums::add({x_[row_tile] + at, x_[row_tile + 1] + at}, k_, {weights[0] + weight, weights[BLOCKS - 1] + weight});
        }
        if (turn_) add_products();
        if (row_tile == 0)
            for (int block = 0; block < BLOCKS; block++) scale_[block] = scales_[block](tile);
        Sums::store(products_[turn_++ % 2]);
        kept_row_tile_ = row_tile;
        kept_count_ = ROW_TILES;
    }

    void add_products() {
        const auto& products = products_[(turn_ + 1) % 2];
        for (int i = 0; i < kept_count_; i++)
            for (int block = 0; block < BLOCKS; block++) {
                auto& totals = totals_[kept_row_tile_ + i][block];
#pragma GCC unroll 16
                for (int row = 0; row < M_TILE; row++)
                    totals[row] += load(products[i][block] + row * BLOCK_N) * scale_[block];
            }
    }

    const int64_t k_;
    const BFloat16* const* x_;
    const int64_t row_tiles_;
    const __m512i codebook_;
    const uint8_t* const codes_[2];
    Scales<Group> scales_[2];
    F32x16 scale_[BLOCKS];
    int64_t turn_ = 0, kept_row_tile_ = 0;
    int kept_count_ = 0;
    alignas(64) BFloat16 weights_[2][BLOCKS][BLOCK_K * BLOCK_N];
    alignas(64) float products_[2][2][BLOCKS][C_TILE];
    F32x16 totals_[MAX_ROW_TILES][BLOCKS][M_TILE];
};

// ---- many rows, for which weights are decoded and scaled once --------------------------------------------------------

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
