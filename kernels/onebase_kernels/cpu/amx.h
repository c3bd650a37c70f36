// Intel's matrix tiles, always full ones: 16 rows of 64 bytes; and the shuffles that bring numbers into their order.
//
// A left operand is [16 rows][32 numbers] of bfloat16, a right one [16 pairs of numbers][16 columns][2], and the product
// [16 rows][16 columns] of fp32.
#pragma once

#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "aligned_vector.h"
#include "simd.h"

namespace onebase {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Full tiles for as long as it lives; one for each thread that computes.
class Tiles {
public:
    Tiles() {
        static const TileConfig config;
        asm volatile("" : : "r"(&config) : "memory");  // gcc 12 believes that only its first bytes are read
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// Asks the kernel for the tiles' state, once for the process; false where it refuses.
inline bool request_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// 32 words of two registers, alternately from each: the first or the second half of both.
inline __m512i interleave_low(__m512i a, __m512i b) {
    const __m512i index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(a, index, b);
}
inline __m512i interleave_high(__m512i a, __m512i b) {
    const __m512i index = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                           53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(a, index, b);
}

// Two vectors rounded to bfloat16, alternately from each.
inline __m512i pair_up(F32x16 even, F32x16 odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return interleave_low(halves, _mm512_shuffle_i64x2(halves, halves, 0x4e));
}

// 16 × 16 numbers of 32 bits.
inline void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {  // quarter q of fours[i + 4g] is column 4q + i of rows 4g to 4g + 3
        const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
        const __m512i even_low = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(even, even_low, 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(odd, odd_low, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(even, even_low, 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(odd, odd_low, 0xdd);
    }
}

}  // namespace onebase
