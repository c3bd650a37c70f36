// Products of many rows of bfloat16 by AMX: some blocks of weights become right-hand tiles once for all rows, whatever they
// are stored as, and all sums stay in AMX's registers.
#pragma once

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "blockwise_weight.h"
#include "side_path.h"

namespace onebase {

constexpr int64_t M_TILE = 16;  // rows of x of a tile
constexpr int64_t K_TILE = 32;  // inputs of a tile
constexpr int64_t C_TILE = M_TILE * BLOCK_N;

constexpr int64_t DECODED_BYTES = 512 << 10;     // of weights at a time, for the second cache
constexpr int64_t WEIGHTS_AHEAD = 4 * K_TILE;  // inputs whose weights are on their way from there to the first

// The rows of x as AMX reads them, 16 at a time: those of whole tiles where they are, the others in a copy.
struct RowTiles {
    RowTiles(const BFloat16* x, int64_t m, int64_t k) : x(x), whole(m / M_TILE * M_TILE), rest(m - whole) {
        if (!rest) return;
        last.resize(M_TILE * k);
        std::memcpy(last.data(), x + whole * k, rest * k * sizeof(BFloat16));
    }
    const BFloat16* x;
    int64_t whole, rest;
    AlignedVector<BFloat16> last;
};

// Up to 16 rows of a matrix [rows, k] as right-hand tiles, one for every 32 numbers of a row; rows that are lacking are zero.
inline void order_tiles(const BFloat16* matrix, int64_t rows, int64_t k, BFloat16* to) {
    for (int64_t i = 0; i < k; i += K_TILE) {
        __m512i tile[BLOCK_N];
        for (int64_t row = 0; row < BLOCK_N; row++)
            tile[row] = row < rows ? _mm512_loadu_si512(matrix + row * k + i) : _mm512_setzero_si512();
        transpose(tile);
        std::memcpy(to + i * BLOCK_N, tile, sizeof tile);
    }
}

// The sums of one or two left tiles times one or two right ones, in AMX's registers 0 to 3; its operands are constants, hence
// the spelled out cases.
template <int LEFTS, int RIGHTS>
struct TileSums {
    static void zero() {
        _tile_zero(0);
        if constexpr (RIGHTS > 1) _tile_zero(1);
        if constexpr (LEFTS > 1) _tile_zero(2);
        if constexpr (LEFTS > 1 && RIGHTS > 1) _tile_zero(3);
    }

    // 32 inputs more, of left tiles whose rows lie `left_stride` apart.
    [[gnu::always_inline]] static void add(const BFloat16* const (&left)[2], int64_t left_stride,
                                           const BFloat16* const (&right)[2]) {
        _tile_loadd(4, left[0], 2 * left_stride);
        _tile_loadd(6, right[0], 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (RIGHTS > 1) {
            _tile_loadd(7, right[1], 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (LEFTS > 1) {
            _tile_loadd(5, left[1], 2 * left_stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (LEFTS > 1 && RIGHTS > 1) _tile_dpbf16ps(3, 5, 7);
    }

    // To [left][right], which can be loaded only long after.
    static void store(float (&to)[2][2][C_TILE]) {
        _tile_stored(0, to[0][0], 64);
        if constexpr (RIGHTS > 1) _tile_stored(1, to[0][1], 64);
        if constexpr (LEFTS > 1) _tile_stored(2, to[1][0], 64);
        if constexpr (LEFTS > 1 && RIGHTS > 1) _tile_stored(3, to[1][1], 64);
    }

    static void load(const float (&from)[2][2][C_TILE]) {
        _tile_loadd(0, from[0][0], 64);
        if constexpr (RIGHTS > 1) _tile_loadd(1, from[0][1], 64);
        if constexpr (LEFTS > 1) _tile_loadd(2, from[1][0], 64);
        if constexpr (LEFTS > 1 && RIGHTS > 1) _tile_loadd(3, from[1][1], 64);
    }
};

inline void prefetch_tile(const BFloat16* tile) {
    for (int64_t line = 0; line < 16; line++) __builtin_prefetch(tile + line * 32);
}

// Products of up to 32 rows and two blocks of outputs, on their way to y.
template <class Y>
struct Products {
    alignas(64) float sums[2][2][C_TILE];  // of each tile of rows and each block
    int64_t rows = 0, blocks = 0;
    const BFloat16* bias = nullptr;  // at the first output
    Y* y;                            // at the first row and output

    void finish(int64_t first, int64_t last, int64_t y_stride) const {
        const F32x16 biases[2] = {load_bias(bias, 0), load_bias(bias, blocks - 1)};
        for (int64_t row = first; row < std::min(last, rows); row++) {
            const auto total = [&](int64_t block) {
                return load(sums[row / M_TILE][block] + row % M_TILE * BLOCK_N) + biases[block];
            };
            if (blocks == 2) store_two(y + row * y_stride, total(0), total(1));
            else store(y + row * y_stride, total(0));
        }
    }
};

// One tile of rows or two, times one block or two. `previous` is finished meanwhile, some rows for each product: otherwise
// the units for vectors would idle, then those for products.
template <int ROW_TILES, int BLOCKS, class Y>
void multiply_tiles(const BFloat16* x, int64_t k, const BFloat16* weights, Products<Y>& products,
                    const Products<Y>& previous, int64_t y_stride) {
    using Sums = TileSums<ROW_TILES, BLOCKS>;
    const BFloat16 *lower = x + M_TILE * k, *second = weights + k * BLOCK_N;
    const int64_t steps = k / K_TILE, rows_each = (2 * M_TILE + steps - 1) / steps;
    Sums::zero();
    for (int64_t input = 0, row = 0; input < k; input += K_TILE, row += rows_each) {
        prefetch_tile(weights + (input + WEIGHTS_AHEAD) * BLOCK_N);
        if constexpr (BLOCKS > 1) prefetch_tile(second + (input + WEIGHTS_AHEAD) * BLOCK_N);
        Sums::add({x + input, lower + input}, k, {weights + input * BLOCK_N, second + input * BLOCK_N});
        previous.finish(row, row + rows_each, y_stride);
    }
    Sums::store(products.sums);
}

// y[m rows, outputs of some blocks] of x, readable in whole tiles of rows, and right-hand tiles of weights; all pointers at
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
    both[(turn + 1) % 2].finish(0, 2 * M_TILE, y_stride);
}

template <class Y>
void multiply_many(const RowTiles& rows, int64_t k, const BFloat16* weights, int64_t num_blocks, const BFloat16* bias, Y* y,
                   int64_t y_stride) {
    multiply_many(rows.x, rows.whole, k, weights, num_blocks, bias, y, y_stride);
    multiply_many(rows.last.data(), rows.rest, k, weights, num_blocks, bias, y + rows.whole * y_stride, y_stride);
}

// y = x · weightᵀ + bias. `decode_block(group, block, to)` makes a block of 16 outputs right-hand tiles, one for every 32
// inputs.
template <class Group, class Y>
void linear_many(const Group& group, const RowTiles& rows, const BFloat16* bias, Y* y) {
    const int64_t k = group.num_inputs, n = group.num_outputs;
    const int64_t num_blocks = n / BLOCK_N, pairs = (num_blocks + 1) / 2;
    const int64_t at_once = std::max<int64_t>(DECODED_BYTES / (2 * BLOCK_N * k * sizeof(BFloat16)), 1);
    parallel_with_side_path(pairs, rows.x, 2, [&](int64_t first, int64_t last, FetchAhead& fetch) {
        const Tiles tiles;
        thread_local AlignedVector<BFloat16> weights;
        for (int64_t pair = first; pair < last; pair += at_once) {
            const int64_t block = 2 * pair, output = block * BLOCK_N;
            const int64_t blocks = std::min(2 * std::min(at_once, last - pair), num_blocks - block);
            weights.resize(blocks * BLOCK_N * k);
            for (int64_t i = 0; i < blocks; i++) {
                fetch();
                decode_block(group, block + i, weights.data() + i * BLOCK_N * k);
            }
            multiply_many(rows, k, weights.data(), blocks, bias ? bias + output : nullptr, y + output, n);
        }
    });
}

}  // namespace onebase
