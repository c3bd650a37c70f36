// NF4 × activations, fused: codes are decoded in registers and never written to memory as a weight matrix.
//
// fp32 is computed in fp32 throughout. For bfloat16 the codebook is rounded to bfloat16 first. A tile has one scale for
// each output, so products are summed over a tile first and scaled then, in fp32.

#include <vector>

#include "nf4_weight.h"
#include "parallel.h"
#include "step.h"

#if defined(__AVX512BF16__)
#include "nf4_pairs.h"
#endif
#if defined(__AMX_BF16__)
#include "nf4_amx.h"
#endif

namespace onebase {

struct Nf4Linear {
    const Nf4Group* group;
    const void* x;      // [rows, num_inputs]
    void* y;            // [rows, num_outputs]
    const void* bias;   // [num_outputs] of x's dtype; may be null
    int32_t x_dtype, y_dtype;
};

namespace {

template <class T>
inline F32x16 load_bias(const T* bias, int64_t block) {
    return bias ? load(bias + block * BLOCK_N) : F32x16{};
}

// ---- fp32: decode, multiply and add ---------------------------------------------------------------------------------

// y[ROWS, 16 outputs] of ROWS rows of x.
template <int ROWS, class T>
void multiply_wide(const Nf4Group& group, int64_t block, const float* x, F32x16 bias, T* y) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    Scales scales(group, block);
    F32x16 total[ROWS];
    for (auto& sum : total) sum = bias;
    for (int64_t tile = 0; tile < tiles; tile++) {
        F32x16 part[ROWS] = {};
        for (int64_t row = 0; row < TILE_ROWS; row++) {
            const U32x16 packed = load_raw<U32x16>(codes + (tile * TILE_ROWS + row) * 64);
            const float* inputs = x + tile * BLOCK_K + row * ROW_INPUTS;
#pragma GCC unroll 8
            for (int input = 0; input < ROW_INPUTS; input++) {
                const F32x16 weight = lookup(CODEBOOK, packed >> (input % 2 * 16 + input / 2 * 4));
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++) part[m] += weight * inputs[m * k + input];
            }
        }
        const F32x16 scale = scales(tile);
        for (int m = 0; m < ROWS; m++) total[m] += part[m] * scale;
    }
    for (int m = 0; m < ROWS; m++) store(y + m * group.num_outputs + block * BLOCK_N, total[m]);
}

template <class X, class Y>
void linear_wide(const Nf4Group& group, const X* x, int64_t m, const X* bias, Y* y) {
    const int64_t k = group.num_inputs;
    std::vector<float> wide(m * k);
    for (int64_t i = 0; i < m * k; i += LANES) store(wide.data() + i, load(x + i));
    parallel(group.num_outputs / BLOCK_N, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++) {
            const F32x16 start = load_bias(bias, block);
            int64_t row = 0;
            const auto multiply = [&]<int ROWS>() {  // a block is decoded once for so many rows
                for (; row + ROWS <= m; row += ROWS)
                    multiply_wide<ROWS>(group, block, wide.data() + row * k, start, y + row * group.num_outputs);
            };
            multiply.template operator()<8>();
            multiply.template operator()<4>();
            multiply.template operator()<2>();
            multiply.template operator()<1>();
        }
    });
}

#if defined(__AVX512BF16__)
template <class Y>
void linear_pairs(const Nf4Group& group, const BFloat16* x, int64_t m, const BFloat16* bias, Y* y) {
    const FixedPointRows rows(x, m, group.num_inputs);
    parallel(group.num_outputs / BLOCK_N, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++) {
            const F32x16 start = load_bias(bias, block);
            int64_t row = 0;
            const auto multiply = [&]<int ROWS>() {
                for (; row + ROWS <= m; row += ROWS) multiply_pairs<ROWS>(group, block, rows, row, start, y);
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
constexpr int64_t FEW = 2;    // up to so many rows, fixed point is faster than AMX
constexpr int64_t SOME = 32;  // up to so many, scaling products is faster than scaling weights

template <class Y>
void linear_amx(const Nf4Group& group, const BFloat16* x, int64_t m, const BFloat16* bias, Y* y) {
    const int64_t k = group.num_inputs, whole = m / M_TILE * M_TILE;
    std::vector<BFloat16> last_rows;  // AMX reads whole tiles of rows
    if (whole != m) {
        last_rows.resize(M_TILE * k);
        std::memcpy(last_rows.data(), x + whole * k, (m - whole) * k * sizeof(BFloat16));
    }
    parallel(group.num_outputs / BLOCK_N, [&](int64_t first, int64_t last) {
        const Tiles tiles;
        for (int64_t block = first; block < last; block++) {
            const F32x16 start = load_bias(bias, block);
            int64_t row = 0;
            if (m > SOME) {
                multiply_many(group, block, x, whole, start, y);
                row = whole;
            }
            for (; row < whole; row += M_TILE)
                multiply_some(group, block, x + row * k, M_TILE, start, y + row * group.num_outputs);
            if (row < m) multiply_some(group, block, last_rows.data(), m - row, start, y + row * group.num_outputs);
        }
    });
}
#endif

template <class X, class Y>
void linear(const Nf4Group& group, const X* x, int64_t m, const X* bias, Y* y) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(X) == sizeof(BFloat16)) {
#if defined(__AMX_BF16__)
        if (m > FEW) return linear_amx(group, x, m, bias, y);
#endif
        return linear_pairs(group, x, m, bias, y);
    }
#endif
    linear_wide(group, x, m, bias, y);
}

}  // namespace
}  // namespace onebase

// The contract of nf4_linear in reference.py.
ONEBASE_EXPORT void onebase_nf4_linear(const onebase::Nf4Linear* call, const onebase::Step* step) {
    onebase::dispatch(call->x_dtype, [&]<class X>() {
        onebase::dispatch(call->y_dtype, [&]<class Y>() {
            onebase::linear(*call->group, static_cast<const X*>(call->x), step->rows, static_cast<const X*>(call->bias),
                            static_cast<Y*>(call->y));
        });
    });
}

// Whether this machine and its kernel let the library run as compiled; called once, before anything else.
ONEBASE_EXPORT int32_t onebase_start() {
#if defined(__AMX_BF16__)
    return onebase::request_tiles();
#else
    return 1;
#endif
}
