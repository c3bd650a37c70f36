// The side path of single rows in bfloat16's dot products: of pairs of inputs in the shrink, of ranks in the expand. What
// is shrunk is rounded to bfloat16, as PEFT does. Where no op before has fetched its matrices (side_path.h), it is memory
// that this waits for, and so tells early what comes next: by itself the processor looks ahead within 4 KiB only.
#pragma once

#include <algorithm>

#include "lora_call.h"

namespace onebase {

constexpr int64_t FEW_PRODUCTS = 128;  // rows times ranks of a linear, up to which its rows are best computed one by one
constexpr int64_t RANKS_OF_A = 4;      // that share one reading of x
constexpr int64_t RANKS_OF_B = 8;      // that share one reading of the sums
constexpr int64_t ROW_STEP = 32;       // numbers of a register
constexpr int64_t FETCH_AHEAD = 8192;  // bytes

template <bool IS_FETCHED>
inline void fetch_ahead(const BFloat16* numbers) {
    if constexpr (!IS_FETCHED) __builtin_prefetch(reinterpret_cast<const char*>(numbers) + FETCH_AHEAD);
}

// Whether such matrices of this width have whole registers only.
inline bool is_whole(const BFloat16*, int64_t width) { return width % ROW_STEP == 0; }

// out[rank] = x · a[rank], of whole registers.
template <bool IS_FETCHED>
inline void shrink_row(const BFloat16* x, const BFloat16* a, int64_t k, int64_t ranks, float* out) {
    for (int64_t rank = 0; rank < ranks; rank += RANKS_OF_A) {
        const int64_t last = ranks - 1 - rank;  // where fewer are left, the last is computed several times
        __m512 sums[RANKS_OF_A] = {};
        for (int64_t i = 0; i < k; i += ROW_STEP) {
            const __m512bh inputs = load_raw<__m512bh>(x + i);
            for (int64_t j = 0; j < RANKS_OF_A; j++) {
                const BFloat16* row = a + (rank + std::min(j, last)) * k + i;
                fetch_ahead<IS_FETCHED>(row);
                sums[j] = _mm512_dpbf16_ps(sums[j], inputs, load_raw<__m512bh>(row));
            }
        }
        for (int64_t j = 0; j <= std::min(RANKS_OF_A - 1, last); j++) out[rank + j] = sum((F32x16)sums[j]);
    }
}

// 32 columns' sums over some ranks of B. A register of pairs of two ranks holds four columns of every eight, hence so do
// the sums until the end.
struct PairSums {
    __m512 low, high;
};

// y[32 columns] += sums, then the epilogue.
inline void add_sums(PairSums sums, const BFloat16* gain, int64_t width, BFloat16* y) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512i orders[2] = {first, second};
    for (int64_t half = 0; half < 2; half++) {
        const int64_t at = half * LANES;
        F32x16 total = load(y + at) + (F32x16)_mm512_permutex2var_ps(sums.low, orders[half], sums.high);
        if (gain) total = finish(total, gain + at, width);
        store(y + at, total);
    }
}

// y[columns] += shrunk[ranks] · b[ranks, columns of width], then the epilogue, of whole registers; `sums` is room for
// those of all columns.
template <bool IS_FETCHED>
inline void expand_row(const BFloat16* b, int64_t ranks, int64_t width, int64_t columns, const float* shrunk,
                       const BFloat16* gain, PairSums* sums, BFloat16* y) {
    constexpr int64_t PAIRS = RANKS_OF_B / 2;
    const auto gain_at = [&](int64_t column) { return gain ? gain + column : nullptr; };
    if (ranks == 0)
        for (int64_t column = 0; column < columns; column += ROW_STEP) add_sums(PairSums{}, gain_at(column), width, y + column);
    for (int64_t rank = 0; rank < ranks; rank += RANKS_OF_B) {
        const BFloat16* rows[RANKS_OF_B];  // where fewer are left, the last ones are all the same, times nothing
        __m512bh factors[PAIRS];
        for (int64_t j = 0; j < RANKS_OF_B; j++) rows[j] = b + std::min(rank + j, ranks - 1) * width;
        for (int64_t j = 0; j < PAIRS; j++) {
            BFloat16 pair[2] = {};
            for (int64_t i = 0; i < 2; i++)
                if (rank + 2 * j + i < ranks) store_one(pair + i, shrunk[rank + 2 * j + i]);
            int32_t bits;
            std::memcpy(&bits, pair, sizeof bits);
            factors[j] = (__m512bh)_mm512_set1_epi32(bits);
        }
        const bool is_last = rank + RANKS_OF_B >= ranks;
        for (int64_t column = 0; column < columns; column += ROW_STEP) {
            PairSums total = rank ? sums[column / ROW_STEP] : PairSums{};
#pragma GCC unroll 4
            for (int64_t j = 0; j < PAIRS; j++) {
                fetch_ahead<IS_FETCHED>(rows[2 * j] + column);
                fetch_ahead<IS_FETCHED>(rows[2 * j + 1] + column);
                const __m512i even = _mm512_loadu_si512(rows[2 * j] + column);
                const __m512i odd = _mm512_loadu_si512(rows[2 * j + 1] + column);
                total.low = _mm512_dpbf16_ps(total.low, factors[j], (__m512bh)_mm512_unpacklo_epi16(even, odd));
                total.high = _mm512_dpbf16_ps(total.high, factors[j], (__m512bh)_mm512_unpackhi_epi16(even, odd));
            }
            if (is_last) add_sums(total, gain_at(column), width, y + column);
            else sums[column / ROW_STEP] = total;
        }
    }
}

}  // namespace onebase
