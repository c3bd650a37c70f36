// Weights of int8 by rows as the kernels read them: code · absmax / 127.
//
// Packed layout (int8_packing.py makes it): outputs in blocks of 16, for each of them the codes of two inputs of an output
// side by side, [inputs / 2][16 outputs][2], which is the order of AMX's right-hand tiles.
#pragma once

#include "blockwise_weight.h"

namespace onebase {

struct Int8Group {
    static constexpr float MAX_CODE = 127.0f;

    const int8_t* codes;
    const float* absmax;  // of each output
    int64_t num_outputs;
    int64_t num_inputs;

    F32x16 scale(int64_t block) const { return load(absmax + block * BLOCK_N) * (1 / MAX_CODE); }
};

// A block of outputs as right-hand tiles, one for every 32 inputs.
inline void decode_block(const Int8Group& group, int64_t block, BFloat16* to) {
    const int8_t* codes = group.codes + block * group.num_inputs * BLOCK_N;
    const F32x16 scale = group.scale(block);
    const F32x16 first = __builtin_shufflevector(scale, scale, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const F32x16 second = __builtin_shufflevector(scale, scale, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
    for (int64_t i = 0; i < group.num_inputs * BLOCK_N; i += 2 * LANES) {
        __builtin_prefetch(codes + i + BYTES_AHEAD);
        store(to + i, load(codes + i) * first);
        store(to + i + LANES, load(codes + i + LANES) * second);
    }
}

// y[ROWS, 16 outputs] of ROWS rows of x from `row` on.
template <int ROWS, class X, class Y>
void multiply_wide(const Int8Group& group, int64_t block, const float* x, int64_t row,
                   const Starts<Int8Group, X>& starts, Y* y) {
    const int64_t k = group.num_inputs;
    const int8_t* codes = group.codes + block * k * BLOCK_N;
    F32x16 products[ROWS] = {}, total[ROWS];
    for (int64_t input = 0; input < k; input += 2) {
        __builtin_prefetch(codes + input * BLOCK_N + BYTES_AHEAD);
        const F32x16 first = load(codes + input * BLOCK_N), second = load(codes + input * BLOCK_N + LANES);
        const F32x16 even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const F32x16 odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            const float* inputs = x + (row + m) * k + input;
            products[m] += even * inputs[0];
            products[m] += odd * inputs[1];
        }
    }
    starts.set(total, block, row);
    const F32x16 scale = group.scale(block);
    for (int m = 0; m < ROWS; m++)
        store(y + (row + m) * group.num_outputs + block * BLOCK_N, total[m] + products[m] * scale);
}

}  // namespace onebase
