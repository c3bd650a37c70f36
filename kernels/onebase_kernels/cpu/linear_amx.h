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

// The sums of one or two tiles of rows times one or two blocks of outputs, of BLOCK_K inputs, in AMX's registers 0 to 3.
template <int64_t BLOCK_K, int ROW_TILES, int BLOCKS>
[[gnu::always_inline]] inline void multiply_tile(const BFloat16* first, const BFloat16* second, int64_t k,
                                                 const BFloat16 (*weights)[BLOCK_K * BLOCK_N]) {
    _tile_zero(0);
    if constexpr (BLOCKS > 1) _tile_zero(1);
    if constexpr (ROW_TILES > 1) _tile_zero(2);
    if constexpr (ROW_TILES > 1 && BLOCKS > 1) _tile_zero(3);
    for (int64_t input = 0; input < BLOCK_K; input += K_TILE) {
        _tile_loadd(4, first + input, 2 * k);
        _tile_loadd(6, weights[0] + input * BLOCK_N, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (BLOCKS > 1) {
            _tile_loadd(7, weights[1] + input * BLOCK_N, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROW_TILES > 1) {
            _tile_loadd(5, second + input, 2 * k);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (ROW_TILES > 1 && BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
    }
}

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
            for (int64_t row_tile = 0; row_tile < row_tiles_; row_tile += 2, turn_++) {
                const BFloat16 *first = x_[row_tile] + tile * BLOCK_K, *second = x_[row_tile + 1] + tile * BLOCK_K;
                const int count = row_tile + 1 < row_tiles_ ? 2 : 1;
                if (row_tile == 0) {
                    fetch();
                    if (tile + 1 < tiles) decode(tile + 1);
                }
                if (count == 2) multiply_tile<BLOCK_K, 2, BLOCKS>(first, second, k_, weights_[tile % 2]);
                else multiply_tile<BLOCK_K, 1, BLOCKS>(first, second, k_, weights_[tile % 2]);
                if (turn_) add_products();
                if (row_tile == 0)
                    for (int block = 0; block < BLOCKS; block++) scale_[block] = scales_[block](tile);
                keep_products(row_tile, count);
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

    // What AMX has computed goes to memory, to be scaled after the next products.
    void keep_products(int64_t row_tile, int count) {
        auto& products = products_[turn_ % 2];
        _tile_stored(0, products[0][0], 64);
        if constexpr (BLOCKS > 1) _tile_stored(1, products[0][1], 64);
        if (count > 1) {
            _tile_stored(2, products[1][0], 64);
            if constexpr (BLOCKS > 1) _tile_stored(3, products[1][1], 64);
        }
        kept_row_tile_ = row_tile;
        kept_count_ = count;
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

// ---- many rows: weights are decoded and scaled once for all of them, and all sums stay in AMX's registers -------------

constexpr int64_t DECODED_BYTES = 512 << 10;  // of weights at a time, for the second cache

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
