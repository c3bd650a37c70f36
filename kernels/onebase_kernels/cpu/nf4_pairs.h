// Products of bfloat16 activations and NF4 weights by the machine's dot products of pairs (AVX512-BF16).
#pragma once

#include "nf4_weight.h"

namespace onebase {

// The codebook twice, for a lookup of 16-bit words goes by five bits of which only four are a code's.
inline __m512i bf16_codebook() {
    const __m256i once = (__m256i)narrow(CODEBOOK);
    return _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
}

// A row of a tile as pairs of inputs PAIR of 16 outputs.
template <int PAIR>
inline __m512bh decode_pair(__m512i codebook, __m512i row) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(row, 4 * PAIR), codebook);
}

inline __m512 dot_pairs(__m512 sum, __m512bh weights, const BFloat16* two_inputs) {
    int32_t two;
    std::memcpy(&two, two_inputs, 4);
    return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(two));
}

template <int ROWS, class Y>
void multiply_pairs(const Nf4Group& group, int64_t block, const BFloat16* x, F32x16 bias, Y* y) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    const __m512i codebook = bf16_codebook();
    Scales scales(group, block);
    F32x16 total[ROWS];
    for (auto& sum : total) sum = bias;
    for (int64_t tile = 0; tile < tiles; tile++) {
        __m512 even[ROWS] = {}, odd[ROWS] = {};  // two chains of sums, for one would wait for itself
#pragma GCC unroll 8
        for (int64_t row = 0; row < TILE_ROWS; row++) {
            const __m512i packed = _mm512_loadu_si512(codes + (tile * TILE_ROWS + row) * 64);
            const BFloat16* inputs = x + tile * BLOCK_K + row * ROW_INPUTS;
            const __m512bh weights[4] = {decode_pair<0>(codebook, packed), decode_pair<1>(codebook, packed),
                                         decode_pair<2>(codebook, packed), decode_pair<3>(codebook, packed)};
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++) {
                even[m] = dot_pairs(even[m], weights[0], inputs + m * k);
                odd[m] = dot_pairs(odd[m], weights[1], inputs + m * k + 2);
                even[m] = dot_pairs(even[m], weights[2], inputs + m * k + 4);
                odd[m] = dot_pairs(odd[m], weights[3], inputs + m * k + 6);
            }
        }
        const F32x16 scale = scales(tile);
        for (int m = 0; m < ROWS; m++) total[m] += ((F32x16)even[m] + (F32x16)odd[m]) * scale;
    }
    for (int m = 0; m < ROWS; m++) store(y + m * group.num_outputs + block * BLOCK_N, total[m]);
}

}  // namespace onebase
