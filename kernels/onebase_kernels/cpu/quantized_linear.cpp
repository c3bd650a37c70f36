// Quantised weights × activations, fused: of a decoded weight matrix there is never more than a cache holds.
//
// fp32 is computed in fp32 throughout. For up to 16 rows of bfloat16 the codebook is rounded to bfloat16 first, and as a
// tile has one scale for each output, products are summed over a tile first and scaled then, in fp32. For more rows what
// codes stand for is scaled first, and rounded to bfloat16 then.

#include <vector>

#include "int4_weight.h"
#include "int8_weight.h"
#include "blockwise_weight.h"
#include "side_path.h"
#include "step.h"

#if defined(__AVX512BF16__)
#include "linear_pairs.h"
#endif
#if defined(__AMX_BF16__)
#include "linear_amx.h"
#include "linear_tables.h"
#endif

namespace onebase {

template <class Weights>
struct QuantizedLinear {
    const Weights* group;
    const void* x;      // [rows, num_inputs]
    void* y;            // [rows, num_outputs]
    const void* bias;   // [num_outputs] of x's dtype; may be null
    int32_t x_dtype, y_dtype;
};

namespace {

// ---- fp32: decode, multiply and add ---------------------------------------------------------------------------------

// y[ROWS, 16 outputs] of ROWS rows of x from `row` on.
template <int ROWS, class Group, class X, class Y>
void multiply_wide(const Group& group, int64_t block, const float* x, int64_t row, const Starts<Group, X>& starts, Y* y) {
    const int64_t k = group.num_inputs, tiles = k / Group::BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES<Group>;
    const F32x16 codebook = group.codebook();
    Scales<Group> scales(group, block);
    F32x16 total[ROWS];
    starts.set(total, block, row);
    for (int64_t tile = 0; tile < tiles; tile++) {
        F32x16 part[ROWS] = {};
        for (int64_t i = 0; i < TILE_ROWS<Group>; i++) {
            const U32x16 packed = load_raw<U32x16>(codes + (tile * TILE_ROWS<Group> + i) * ROW_BYTES);
            const float* inputs = x + row * k + tile * Group::BLOCK_K + i * ROW_INPUTS;
#pragma GCC unroll 8
            for (int input = 0; input < ROW_INPUTS; input++) {
                const F32x16 weight = lookup(codebook, packed >> (input % 2 * 16 + input / 2 * 4));
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++) part[m] += weight * inputs[m * k + input];
            }
        }
        const F32x16 scale = scales(tile);
        for (int m = 0; m < ROWS; m++) total[m] += part[m] * scale;
    }
    for (int m = 0; m < ROWS; m++) store(y + (row + m) * group.num_outputs + block * BLOCK_N, total[m]);
}

template <class Group, class X, class Y>
void linear_wide(const Group& group, const X* x, int64_t m, const X* bias, Y* y) {
    const int64_t k = group.num_inputs;
    const Starts<Group, X> starts(group, x, m, bias);
    std::vector<float> wide(m * k);
    for (int64_t i = 0; i < m * k; i += LANES) store(wide.data() + i, load(x + i));
    parallel_with_side_path(group.num_outputs / BLOCK_N, x, 1, [&](int64_t first, int64_t last, FetchAhead& fetch) {
        for (int64_t block = first; block < last; block++) {
            fetch();
            int64_t row = 0;
            const auto multiply = [&]<int ROWS>() {  // a block is decoded once for so many rows
                for (; row + ROWS <= m; row += ROWS) multiply_wide<ROWS>(group, block, wide.data(), row, starts, y);
            };
            multiply.template operator()<8>();
            multiply.template operator()<4>();
            multiply.template operator()<2>();
            multiply.template operator()<1>();
        }
    });
}

#if defined(__AVX512BF16__)
template <class Group, class Y>
void linear_pairs(const Group& group, const BFloat16* x, int64_t m, const BFloat16* bias, Y* y) {
    const FixedPointRows<Group::BLOCK_K> rows(x, m, group.num_inputs);
    const Starts<Group, BFloat16> starts(group, x, m, bias);
    const int64_t tiles = group.num_inputs / Group::BLOCK_K;
    parallel_with_side_path(group.num_outputs / BLOCK_N, x, tiles, [&](int64_t first, int64_t last, FetchAhead& fetch) {
        for (int64_t block = first; block < last; block++) {
            int64_t row = 0;
            const auto multiply = [&]<int ROWS>() {
                for (; row + ROWS <= m; row += ROWS) multiply_pairs<ROWS>(group, block, rows, row, starts, fetch, y);
            };
            multiply.template operator()<8>();
            multiply.template operator()<4>();
            multiply.template operator()<2>();
            multiply.template operator()<1>();
        }
    });
}
#endif

#if defined(__AMX_BF16__)
constexpr int64_t FEW = 2;     // up to so many rows, fixed point is faster than AMX
constexpr int64_t SOME = 16;   // up to so many, scaling products is faster than scaling weights
constexpr int64_t MORE = 192;  // up to so many, weights from tables are worth the order that x needs

template <class Group, class Y>
void linear_some(const Group& group, const RowTiles& rows, const BFloat16* bias, Y* y) {
    const int64_t k = group.num_inputs, n = group.num_outputs, m = rows.whole + rows.rest;
    const Starts<Group, BFloat16> starts(group, rows.x, m, bias);
    parallel_with_side_path(n / BLOCK_N, rows.x, k / Group::BLOCK_K, [&](int64_t first, int64_t last, FetchAhead& fetch) {
        const Tiles tiles;
        for (int64_t block = first; block < last; block++)
            multiply_some(group, block, rows.rest ? rows.last.data() : rows.x, m, starts, fetch, y);
    });
}
#endif

template <class Group, class X, class Y>
void linear(const Group& group, const X* x, int64_t m, const X* bias, Y* y) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(X) == sizeof(BFloat16)) {
#if defined(__AMX_BF16__)
        if (m > SOME && m <= MORE && group.num_inputs % TABLE_INPUTS == 0) return linear_tables(group, x, m, bias, y);
        if (m > SOME) return linear_many(group, RowTiles(x, m, group.num_inputs), bias, y);
        if (m > FEW) return linear_some(group, RowTiles(x, m, group.num_inputs), bias, y);
#endif
        return linear_pairs(group, x, m, bias, y);
    }
#endif
    linear_wide(group, x, m, bias, y);
}

// int8 has the one kernel for all numbers of rows.
template <class X, class Y>
void linear(const Int8Group& group, const X* x, int64_t m, const X* bias, Y* y) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(X) == sizeof(BFloat16))
        return linear_many(group, RowTiles(x, m, group.num_inputs), bias, y);
#endif
    linear_wide(group, x, m, bias, y);
}

template <class Weights, class Group>
void linear_of_dtypes(const QuantizedLinear<Weights>& call, const Group& group, const Step& step) {
    dispatch(call.x_dtype, [&]<class X>() {
        dispatch(call.y_dtype, [&]<class Y>() {
            linear(group, static_cast<const X*>(call.x), step.rows, static_cast<const X*>(call.bias),
                   static_cast<Y*>(call.y));
        });
    });
}

}  // namespace
}  // namespace onebase

// The contract of quantized_linear in reference.py, for weights with a codebook.
ONEBASE_EXPORT void onebase_blockwise_linear(const onebase::QuantizedLinear<onebase::BlockwiseGroup>* call,
                                       const onebase::Step* step) {
    onebase::linear_of_dtypes(*call, *call->group, *step);
}

// The contract of quantized_linear in reference.py, for int4.
ONEBASE_EXPORT void onebase_int4_linear(const onebase::QuantizedLinear<onebase::Int4Weights>* call,
                                        const onebase::Step* step) {
    if (call->group->group_size == 32) onebase::linear_of_dtypes(*call, onebase::Int4Group<32>{*call->group}, *step);
    else onebase::linear_of_dtypes(*call, onebase::Int4Group<64>{*call->group}, *step);
}

// The contract of quantized_linear in reference.py, for int8.
ONEBASE_EXPORT void onebase_int8_linear(const onebase::QuantizedLinear<onebase::Int8Group>* call,
                                        const onebase::Step* step) {
    onebase::linear_of_dtypes(*call, *call->group, *step);
}

// Whether this machine and its kernel let the library run as compiled; called once, before anything else.
ONEBASE_EXPORT int32_t onebase_start() {
#if defined(__AMX_BF16__)
    return onebase::request_tiles();
#else
    return 1;
#endif
}
