// bfloat16 weights × activations, for the output head and bases that are not quantised.

#include <algorithm>

#include "dense_block.h"
#if defined(__AMX_BF16__)
#include "linear_many.h"
#endif
#include "side_path.h"
#include "simd.h"
#include "step.h"

namespace onebase {

struct DenseLinear {
    const BFloat16* x;  // [rows, num_inputs]
    const BFloat16* weight;  // [num_outputs, num_inputs]
    const BFloat16* bias;  // [num_outputs]; may be null
    void* y;  // [rows, num_outputs]
    int64_t num_outputs, num_inputs;
    int32_t y_dtype;
};

#if defined(__AMX_BF16__)
// What linear_many.h asks of weights.
struct DenseGroup {
    const BFloat16* weight;
    int64_t num_outputs, num_inputs;
};

inline void decode_block(const DenseGroup& group, int64_t block, BFloat16* to) {
    order_tiles(group.weight + block * BLOCK_N * group.num_inputs, BLOCK_N, group.num_inputs, to);
}
#endif

namespace {

#if defined(__AVX512BF16__)

template <class T>
void linear_of_few(const DenseLinear& call, int64_t m, T* y) {
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

template <class T>
void linear(const DenseLinear& call, int64_t m, T* y) {
#if defined(__AMX_BF16__)
    if (m > BLOCK) {  // up to so many, it takes less to put activations into order than weights
        const DenseGroup group{call.weight, call.num_outputs, call.num_inputs};
        return linear_many(group, RowTiles(call.x, m, call.num_inputs), call.bias, y);
    }
#endif
    linear_of_few(call, m, y);
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
