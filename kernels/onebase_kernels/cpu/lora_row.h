// The side path of single rows in bfloat16's dot products: of pairs of inputs in the shrink, of ranks in the expand. What
// is shrunk is rounded to bfloat16, as PEFT does. Its matrices are read once and that is what it waits for, so memory is
// told early what comes next: by itself the processor looks ahead within a page of 4 KiB only.
#pragma once

#include <algorithm>

#include "lora_call.h"

namespace onebase {

constexpr int64_t FEW_ROWS = 4;     // of a segment, that are computed one by one
constexpr int64_t AT_ONCE = 4;      // ranks that share one reading of x, or of the sums
constexpr int64_t ROW_STEP = 32;    // numbers of a register
constexpr int64_t FETCH_AHEAD = 8192;  // bytes

inline void fetch_ahead(const BFloat16* numbers) {
    __builtin_prefetch(reinterpret_cast<const char*>(numbers) + FETCH_AHEAD);
}

// Whether matrices of this width have whole registers only.
inline bool is_whole(int64_t width) { return width % ROW_STEP == 0; }

// out[rank] = x · a[rank], of whole registers.
inline void shrink_row(const BFloat16* x, const BFloat16* a, int64_t k, int64_t ranks, float* out) {
    for (int64_t rank = 0; rank < ranks; rank += AT_ONCE) {
        const int64_t last = ranks - 1 - rank;  // where fewer are left, the last is computed several times
        __m512 sums[AT_ONCE] = {};
        for (int64_t i = 0; i < k; i += ROW_STEP) {
            const __m512bh inputs = load_raw<__m512bh>(x + i);
            for (int64_t j = 0; j < AT_ONCE; j++) {
                const BFloat16* row = a + (rank + std::min(j, last)) * k + i;
                fetch_ahead(row);
                sums[j] = _mm512_dpbf16_ps(sums[j], inputs, load_raw<__m512bh>(row));
            }
        }
        for (int64_t j = 0; j <= std::min(AT_ONCE - 1, last); j++) out[rank + j] = sum((F32x16)sums[j]);
    }
}

// y[columns] += shrunk[ranks] · b[ranks, columns of width], then the epilogue, of whole registers.
inline void expand_row(const BFloat16* b, int64_t ranks, int64_t width, int64_t columns, const float* shrunk,
                       const BFloat16* gain, float* sums, BFloat16* y) {
    // A register of pairs of two ranks holds four columns of every eight, hence so do its sums until the end.
    std::memset(sums, 0, columns * sizeof(float));
    for (int64_t rank = 0; rank < ranks; rank += AT_ONCE) {
        const BFloat16* rows[AT_ONCE];
        __m512bh factors[AT_ONCE / 2];
        for (int64_t j = 0; j < AT_ONCE; j++) rows[j] = b + std::min(rank + j, ranks - 1) * width;
        for (int64_t j = 0; j < AT_ONCE; j += 2) {
            BFloat16 pair[2] = {};
            for (int64_t i = 0; i < 2; i++)
                if (rank + j + i < ranks) store_one(pair + i, shrunk[rank + j + i]);
            int32_t bits;
            std::memcpy(&bits, pair, sizeof bits);
            factors[j / 2] = (__m512bh)_mm512_set1_epi32(bits);
        }
        for (int64_t column = 0; column < columns; column += ROW_STEP) {
            __m512 low = _mm512_loadu_ps(sums + column), high = _mm512_loadu_ps(sums + column + LANES);
            for (int64_t j = 0; j < AT_ONCE; j += 2) {
                fetch_ahead(rows[j] + column);
                fetch_ahead(rows[j + 1] + column);
                const __m512i even = _mm512_loadu_si512(rows[j] + column), odd = _mm512_loadu_si512(rows[j + 1] + column);
                low = _mm512_dpbf16_ps(low, factors[j / 2], (__m512bh)_mm512_unpacklo_epi16(even, odd));
                high = _mm512_dpbf16_ps(high, factors[j / 2], (__m512bh)_mm512_unpackhi_epi16(even, odd));
            }
            _mm512_storeu_ps(sums + column, low);
            _mm512_storeu_ps(sums + column + LANES, high);
        }
    }
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int64_t column = 0; column < columns; column += ROW_STEP) {
        const __m512 low = _mm512_loadu_ps(sums + column), high = _mm512_loadu_ps(sums + column + LANES);
        const __m512i orders[2] = {first, second};
        for (int64_t half = 0; half < 2; half++) {
            const int64_t at = column + half * LANES;
            F32x16 total = load(y + at) + (F32x16)_mm512_permutex2var_ps(low, orders[half], high);
            if (gain) total = finish(total, gain + at, width);
            store(y + at, total);
        }
    }
}

}  // namespace onebase
