// bfloat16 weights × activations, for the output head and bases that are not quantised.
//
// The weight is read as it lies, [outputs, inputs] row by row: it is the left operand of the tiles, and the activations,
// which are few, are put into the order that the right one needs. Sums are fp32.

#include <algorithm>
#include <vector>

#include "side_path.h"
#include "simd.h"
#include "step.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace onebase {

struct DenseLinear {
    const BFloat16* x;  // [rows, num_inputs]
    const BFloat16* weight;  // [num_outputs, num_inputs]
    const BFloat16* bias;  // [num_outputs]; may be null
    void* y;  // [rows, num_outputs]
    int64_t num_outputs, num_inputs;
    int32_t y_dtype;
};

namespace {

constexpr int64_t BLOCK = 16;    // outputs, and rows of x, of a tile
constexpr int64_t DEPTH = 32;    // inputs of a tile
constexpr int64_t MAX_TILES = 6;  // of rows of x that share one reading of the weight

#if defined(__AVX512BF16__)

// x[m, k] as [m / 16][k / 32] tiles of 16 pairs of inputs × 16 rows; rows past m are zero.
std::vector<BFloat16> transpose_pairs(const BFloat16* x, int64_t m, int64_t k) {
    const int64_t row_tiles = (m + BLOCK - 1) / BLOCK;
    std::vector<BFloat16> tiles(row_tiles * BLOCK * k);
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
void multiply(const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
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
void multiply(const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
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

void multiply_block(int tiles, const BFloat16* weight, const BFloat16* x_tiles, int64_t k, float* sums) {
    switch (tiles) {
        case 1: return multiply<1>(weight, x_tiles, k, sums);
        case 2: return multiply<2>(weight, x_tiles, k, sums);
        case 3: return multiply<3>(weight, x_tiles, k, sums);
        case 4: return multiply<4>(weight, x_tiles, k, sums);
        case 5: return multiply<5>(weight, x_tiles, k, sums);
        default: return multiply<6>(weight, x_tiles, k, sums);
    }
}

template <class T>
void linear(const DenseLinear& call, int64_t m, T* y) {
    const int64_t n = call.num_outputs, k = call.num_inputs;
    const auto x_tiles = transpose_pairs(call.x, m, k);
    parallel_with_side_path(n / BLOCK, call.x, 1, [&](int64_t first, int64_t last, FetchAhead& fetch) {
#if defined(__AMX_BF16__)
        const Tiles configured;
#endif
        alignas(64) float sums[MAX_TILES * BLOCK * BLOCK];
        for (int64_t block = first; block < last; block++) {
            fetch();
            for (int64_t row = 0; row < m; row += MAX_TILES * BLOCK) {
                const int64_t rows = std::min(m - row, MAX_TILES * BLOCK);
                multiply_block(int((rows + BLOCK - 1) / BLOCK), call.weight + block * BLOCK * k,
                               x_tiles.data() + row * k, k, sums);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t output = 0; output < BLOCK; output++) {
                        const int64_t column = block * BLOCK + output;
                        const float bias = call.bias ? load_one(call.bias + column) : 0.0f;
                        store_one(y + (row + i) * n + column,
                                  sums[(i / BLOCK * BLOCK + output) * BLOCK + i % BLOCK] + bias);
                    }
            }
        }
    });
}

#endif

}  // namespace
}  // namespace onebase

// y = x · weightᵀ + bias; num_outputs a multiple of 16, num_inputs of 32. Only variants with products of bfloat16 have it:
// the others' would be no better than torch's own.
ONEBASE_EXPORT void onebase_dense_linear(
    [[maybe_unused]] const onebase::DenseLinear* call, [[maybe_unused]] const onebase::Step* step) {
#if defined(__AVX512BF16__)
    onebase::dispatch(call->y_dtype,
                      [&]<class T>() { onebase::linear(*call, step->rows, static_cast<T*>(call->y)); });
#endif
}

ONEBASE_EXPORT int32_t onebase_has_dense_linear() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
