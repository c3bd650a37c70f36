// The side path of single rows with matrices in 8 bits, by dot products of bytes (AVX512-VNNI): what they are multiplied by
// becomes 15-bit integers, each of them two signed bytes. It reads half of what lora_row.h does, in half the products.
#pragma once

#include <algorithm>
#include <cmath>

#include "aligned_vector.h"
#include "lora_call.h"
#include "lora_row.h"

namespace onebase {

constexpr int64_t BYTE_STEP = 64;         // bytes of a register
constexpr int64_t BYTE_RANKS_OF_A = 4;    // that share one reading of x
constexpr int64_t BYTE_RANKS_OF_B = 16;   // that are summed up as integers
constexpr int64_t QUAD = 4;               // bytes that a dot product adds up
constexpr int64_t MOST_INPUTS = (int64_t(1) << 31) / (255 * 128);
constexpr float SPLIT_MAX = 127 * 128.0f;  // the largest integer whose halves are signed bytes

// Numbers as integers: `unit · (128 · high + low)`.
struct SplitNumbers {
    AlignedVector<int8_t> high, low;
    float unit;    // not a number where one of them is none, or is infinite
    int32_t high_sum, low_sum;  // 128 times them is what bytes, which stand for themselves less 128, give too much

    // As many as fill whole registers of bytes.
    void set(const BFloat16* numbers, int64_t count) {
        high.resize(count);
        low.resize(count);
        const float factor = set_unit(largest_magnitude(numbers, count));
        __m512i high_total = _mm512_setzero_si512(), low_total = high_total;
        const auto add = [](__m512i total, __m512i integers) {
            return _mm512_dpwssd_epi32(total, integers, _mm512_set1_epi16(1));
        };
        for (int64_t i = 0; i < count; i += BYTE_STEP) {
            const auto integers = [&](int64_t at) { return _mm512_cvtps_epi32((__m512)(load(numbers + i + at) * factor)); };
            const __m512i first = _mm512_packs_epi32(integers(0), integers(16));
            const __m512i second = _mm512_packs_epi32(integers(32), integers(48));
            const __m512i first_high = high_halves(first), second_high = high_halves(second);
            const __m512i first_low = _mm512_sub_epi16(first, _mm512_slli_epi16(first_high, 7));
            const __m512i second_low = _mm512_sub_epi16(second, _mm512_slli_epi16(second_high, 7));
            high_total = add(add(high_total, first_high), second_high);
            low_total = add(add(low_total, first_low), second_low);
            store_bytes(high.data() + i, first_high, second_high);
            store_bytes(low.data() + i, first_low, second_low);
        }
        high_sum = _mm512_reduce_add_epi32(high_total);
        low_sum = _mm512_reduce_add_epi32(low_total);
    }

    // A few, filled up with zeros to whole quads.
    void set(const float* numbers, int64_t count) {
        high.assign((count + QUAD - 1) / QUAD * QUAD, 0);
        low.assign(high.size(), 0);
        float largest = 0;
        bool are_finite = true;
        for (int64_t i = 0; i < count; i++) {
            are_finite &= std::isfinite(numbers[i]);
            largest = std::max(largest, std::fabs(numbers[i]));
        }
        const float factor = set_unit(are_finite ? largest : __builtin_nanf(""));
        high_sum = low_sum = 0;
        if (!are_finite) return;
        for (int64_t i = 0; i < count; i++) {
            const int32_t integer = _mm_cvtss_si32(_mm_set_ss(numbers[i] * factor));
            high[i] = int8_t((integer + 64) >> 7);
            low[i] = int8_t(integer - high[i] * 128);
            high_sum += high[i];
            low_sum += low[i];
        }
    }

private:
    static float largest_magnitude(const BFloat16* numbers, int64_t count) {
        __m512i largest = _mm512_setzero_si512();  // of bits without signs, whose order is that of the numbers
        for (int64_t i = 0; i < count; i += ROW_STEP)
            largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(numbers + i), _mm512_set1_epi16(0x7fff)));
        const __m512i wide = _mm512_max_epu32(_mm512_srli_epi32(largest, 16), _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)));
        const BFloat16 most{uint16_t(_mm512_reduce_max_epu32(wide))};
        return load_one(&most);
    }

    float set_unit(float largest) {
        unit = largest < __builtin_inff() ? largest / SPLIT_MAX : __builtin_nanf("");
        return largest > 0 ? SPLIT_MAX / largest : 0;
    }

    static __m512i high_halves(__m512i integers) {
        return _mm512_srai_epi16(_mm512_add_epi16(integers, _mm512_set1_epi16(64)), 7);
    }

    // The 16-bit integers of four vectors of 16 numbers that were packed twice, four of each in turn, in their order.
    static void store_bytes(int8_t* to, __m512i first, __m512i second) {
        const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second)));
    }
};

// As of bfloat16; a sum of more products of bytes may not fit 32 bits.
inline bool is_whole(const Int8Code*, int64_t width) { return width % BYTE_STEP == 0 && width <= MOST_INPUTS; }

template <bool IS_FETCHED>
inline void fetch_ahead(const Int8Code* bytes) {
    if constexpr (!IS_FETCHED) __builtin_prefetch(reinterpret_cast<const char*>(bytes) + FETCH_AHEAD);
}

// 128 · high + low, of a few ranks: for sums of many inputs 32 bits are too few.
inline __m512i joined(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }

// The sum of each of four vectors.
inline __m128i sum_each(const __m512i (&v)[4]) {
    const auto add_pairs = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i first = add_pairs(v[0], v[1]), second = add_pairs(v[2], v[3]);
    const __m512i fours = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// out[rank] = x · a[rank], without a's scales, of whole registers.
template <bool IS_FETCHED>
inline void shrink_row(const BFloat16* inputs, const Int8Code* a, int64_t k, int64_t ranks, float* out) {
    thread_local SplitNumbers x;
    x.set(inputs, k);
    for (int64_t rank = 0; rank < ranks; rank += BYTE_RANKS_OF_A) {
        const int64_t last = ranks - 1 - rank;  // where fewer are left, the last is computed several times
        __m512i high[BYTE_RANKS_OF_A] = {}, low[BYTE_RANKS_OF_A] = {};
        for (int64_t i = 0; i < k; i += BYTE_STEP) {
            const __m512i x_high = _mm512_loadu_si512(x.high.data() + i), x_low = _mm512_loadu_si512(x.low.data() + i);
            for (int64_t j = 0; j < BYTE_RANKS_OF_A; j++) {
                const Int8Code* row = a + (rank + std::min(j, last)) * k + i;
                fetch_ahead<IS_FETCHED>(row);
                const __m512i bytes = _mm512_loadu_si512(row);
                high[j] = _mm512_dpbusd_epi32(high[j], bytes, x_high);
                low[j] = _mm512_dpbusd_epi32(low[j], bytes, x_low);
            }
        }
        const auto products = [](const __m512i (&sums)[BYTE_RANKS_OF_A], int32_t sum) {
            return _mm_cvtepi32_ps(_mm_sub_epi32(sum_each(sums), _mm_set1_epi32(128 * sum)));
        };
        const __m128 highs = _mm_mul_ps(products(high, x.high_sum), _mm_set1_ps(128));
        float four[BYTE_RANKS_OF_A];
        _mm_storeu_ps(four, _mm_mul_ps(_mm_add_ps(highs, products(low, x.low_sum)), _mm_set1_ps(x.unit)));
        std::copy_n(four, std::min(BYTE_RANKS_OF_A, last + 1), out + rank);
    }
}

// Up to BYTE_RANKS_OF_B ranks of B against what they are multiplied by.
template <int QUADS, bool IS_FETCHED>
struct ByteRanks {
    const Int8Code* rows[QUADS][QUAD];  // where fewer are left, the last ones are all the same, times nothing
    __m512i high[QUADS], low[QUADS];

    ByteRanks(const Int8Code* b, int64_t rank, int64_t ranks, int64_t width, const SplitNumbers& shrunk) {
        for (int64_t quad = 0; quad < QUADS; quad++) {
            for (int64_t j = 0; j < QUAD; j++) rows[quad][j] = b + std::min(rank + quad * QUAD + j, ranks - 1) * width;
            const int64_t at = rank + quad * QUAD;
            high[quad] = _mm512_set1_epi32(load_raw<int32_t>(shrunk.high.data() + at));
            low[quad] = _mm512_set1_epi32(load_raw<int32_t>(shrunk.low.data() + at));
        }
    }

    // The sums of 64 columns, in their order.
    [[gnu::always_inline]] void sum_columns(int64_t column, F32x16 (&sums)[QUAD]) const {
        __m512i highs[QUAD] = {}, lows[QUAD] = {};
#pragma GCC unroll 4
        for (int quad = 0; quad < QUADS; quad++) {
            __m512i bytes[QUAD], by_column[QUAD];
            for (int j = 0; j < QUAD; j++) {
                fetch_ahead<IS_FETCHED>(rows[quad][j] + column);
                bytes[j] = _mm512_loadu_si512(rows[quad][j] + column);
            }
            interleave(bytes, by_column);
            for (int j = 0; j < QUAD; j++) {
                highs[j] = _mm512_dpbusd_epi32(highs[j], by_column[j], high[quad]);
                lows[j] = _mm512_dpbusd_epi32(lows[j], by_column[j], low[quad]);
            }
        }
        __m512 fours[QUAD];
        for (int j = 0; j < QUAD; j++) fours[j] = _mm512_cvtepi32_ps(joined(highs[j], lows[j]));
        sort(fours, sums);
    }

private:
    // The four ranks of each column side by side; a register of them holds four columns of every sixteen.
    static void interleave(const __m512i (&ranks)[QUAD], __m512i (&columns)[QUAD]) {
        const __m512i low_pairs[2] = {_mm512_unpacklo_epi8(ranks[0], ranks[1]), _mm512_unpacklo_epi8(ranks[2], ranks[3])};
        const __m512i high_pairs[2] = {_mm512_unpackhi_epi8(ranks[0], ranks[1]), _mm512_unpackhi_epi8(ranks[2], ranks[3])};
        columns[0] = _mm512_unpacklo_epi16(low_pairs[0], low_pairs[1]);
        columns[1] = _mm512_unpackhi_epi16(low_pairs[0], low_pairs[1]);
        columns[2] = _mm512_unpacklo_epi16(high_pairs[0], high_pairs[1]);
        columns[3] = _mm512_unpackhi_epi16(high_pairs[0], high_pairs[1]);
    }
    static void sort(const __m512 (&fours)[QUAD], F32x16 (&sums)[QUAD]) {
        const __m512 low[2] = {_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[2], fours[3], 0x44)};
        const __m512 high[2] = {_mm512_shuffle_f32x4(fours[0], fours[1], 0xee), _mm512_shuffle_f32x4(fours[2], fours[3], 0xee)};
        sums[0] = (F32x16)_mm512_shuffle_f32x4(low[0], low[1], 0x88);
        sums[1] = (F32x16)_mm512_shuffle_f32x4(low[0], low[1], 0xdd);
        sums[2] = (F32x16)_mm512_shuffle_f32x4(high[0], high[1], 0x88);
        sums[3] = (F32x16)_mm512_shuffle_f32x4(high[0], high[1], 0xdd);
    }
};

// y[columns] += shrunk[ranks] · b[ranks, columns of width], then the epilogue, of whole registers. b's scales are in what is
// shrunk; `sums` is room for those of all columns.
template <bool IS_FETCHED>
inline void expand_row(const Int8Code* b, int64_t ranks, int64_t width, int64_t columns, const float* shrunk,
                       const BFloat16* gain, float* sums, BFloat16* y) {
    thread_local SplitNumbers split;
    split.set(shrunk, ranks);
    const float zero = -128.0f * (128.0f * float(split.high_sum) + float(split.low_sum)) * split.unit;
    const auto add_ranks = [&]<int QUADS>(int64_t rank) {
        const ByteRanks<QUADS, IS_FETCHED> of(b, rank, ranks, width, split);
        const bool is_last = rank + QUADS * QUAD >= ranks;
        for (int64_t column = 0; column < columns; column += BYTE_STEP) {
            F32x16 four[QUAD];
            of.sum_columns(column, four);
            for (int64_t j = 0; j < QUAD; j++) {
                const int64_t at = column + j * LANES;
                F32x16 total = four[j] * split.unit + (rank ? load(sums + at) : broadcast(zero));
                if (!is_last) {
                    store(sums + at, total);
                    continue;
                }
                total += load(y + at);
                store(y + at, gain ? finish(total, gain + at, width) : total);
            }
        }
    };
    if (ranks == 0 && gain)
        for (int64_t at = 0; at < columns; at += LANES) store(y + at, finish(load(y + at), gain + at, width));
    for (int64_t rank = 0; rank < ranks; rank += BYTE_RANKS_OF_B)
        switch ((std::min(ranks - rank, BYTE_RANKS_OF_B) + QUAD - 1) / QUAD) {
            case 1: add_ranks.template operator()<1>(rank); break;
            case 2: add_ranks.template operator()<2>(rank); break;
            case 3: add_ranks.template operator()<3>(rank); break;
            default: add_ranks.template operator()<4>(rank);
        }
}

}  // namespace onebase
