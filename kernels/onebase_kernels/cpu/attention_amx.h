// Attention in bfloat16 by AMX: 16 keys times 16 rows at a time, whatever number of rows there really is.
//
// Scores are computed as Kᵀ's rows lie, [key][row], so that softmax goes down columns without a single sum across lanes.
// The weights are then rounded to bfloat16 and transposed, for AMX to multiply the values with. Of a few rows, as when one
// token is decoded, the scores are transposed instead, so that no lane computes the softmax of a row that is not there.
#pragma once

#include "amx.h"
#include "attention_call.h"
#include "fetch_ahead.h"

namespace onebase {

constexpr int64_t KEYS = 16;           // of a tile of scores
constexpr int64_t STEP_KEYS = 32;      // of a product of weights and values
constexpr int64_t PAIRS = 16;          // of numbers, in a row of a tile
constexpr int64_t TILE = MAX_ROWS * 2 * PAIRS;  // numbers of a bfloat16 tile
constexpr int64_t TILE_DIMS = 16;      // of a tile of values
constexpr int64_t KEYS_AHEAD = 128;    // fetched before they are needed
constexpr int64_t FEW_ROWS = 4;
constexpr int MAX_DIM_TILES = 4;       // as many sums as there are registers for, besides the operands'

// Memory of one thread, kept between its pieces.
struct AmxScratch {
    AlignedVector<float> scores;      // [keys][MAX_ROWS]
    AlignedVector<BFloat16> weights;  // [keys / STEP_KEYS][MAX_ROWS][STEP_KEYS]
    AlignedVector<BFloat16> copies;   // keys or values that do not lie as they must
    std::vector<Run> next;            // what the next piece reads first
};

template <int HEAD>
class AmxAttention {
    static_assert(HEAD % (2 * PAIRS) == 0);

public:
    AmxAttention(const Attention& a, const Step& step, const Piece& piece, AmxScratch& scratch)
        : view_(a, step, piece), scratch_(scratch), first_(view_.first_key() / KEYS * KEYS),
          num_keys_(view_.last_key() + 1 - first_), num_steps_((num_keys_ + STEP_KEYS - 1) / STEP_KEYS) {}

    // Adds what the piece reads before it asks memory for itself.
    void add_first_runs(std::vector<Run>& runs) const {
        const auto add = [&](const char* first, const char* end) { runs.push_back({first, end}); };
        each_run(0, KEYS_AHEAD, [&](int64_t key) { return view_.key(key); }, add);
        each_run(0, KEYS_AHEAD, [&](int64_t key) { return view_.value(key); }, add);
    }

    void run() {
        scratch_.scores.resize(num_steps_ * STEP_KEYS * MAX_ROWS);
        scratch_.weights.resize(num_steps_ * TILE);
        scratch_.copies.resize(STEP_KEYS * HEAD);
        fetch_next_ = FetchAhead(scratch_.next, LOOPS * num_steps_);
        pack_queries();
        score_keys();
        // The scale comes after, so the cap is taken without it.
        if (view_.softcap())
            cap_scores(scratch_.scores.data(), num_steps_ * STEP_KEYS * MAX_ROWS, view_.softcap() / view_.scale());
        if (view_.num_rows() <= FEW_ROWS) softmax_of_few();
        else softmax();
        sum_values();
    }

private:
    static constexpr int64_t LOOPS = 3;  // over all steps, of which each fetches a share of the next piece

    struct Rows {
        const BFloat16* at;
        int64_t stride;
    };

    // KEYS keys or values from `key` on (counted from first_), as they lie where they lie together, else copied. Keys
    // past the last become zero: memory that was never written may hold anything, and 0 · NaN is not 0.
    template <class At>
    Rows tile_rows(int64_t key, bool needs_zeros, At at, BFloat16* copy) const {
        const int64_t there = std::min(KEYS, num_keys_ - key);
        if (view_.block_size() % KEYS == 0 && there > 0 && (there == KEYS || !needs_zeros))
            return {at(first_ + key), view_.key_stride()};
        for (int64_t i = 0; i < KEYS; i++) {
            if (i < there) std::memcpy(copy + i * HEAD, at(first_ + key + i), HEAD * sizeof(BFloat16));
            else std::memset(copy + i * HEAD, 0, HEAD * sizeof(BFloat16));
        }
        return {copy, HEAD};
    }

    // Calls `body(first, end)` for the memory of keys or values from `key` on, block by block.
    template <class At, class Body>
    void each_run(int64_t key, int64_t count, At at, const Body& body) const {
        const int64_t end = first_ + std::min(key + count, num_keys_), block_size = view_.block_size();
        const int64_t together = view_.key_stride() == HEAD ? block_size : 1;
        for (int64_t next = first_ + key, last; next < end; next = last) {
            last = std::min(end, next - next % together + together);
            const char* numbers = reinterpret_cast<const char*>(at(next));
            body(numbers, numbers + (last - next) * HEAD * sizeof(BFloat16));
        }
    }

    // A head of each token is no stream to the CPU, so it is told what comes next.
    template <class At>
    void prefetch(int64_t key, int64_t count, At at) const {
        each_run(key, count, at, [](const char* first, const char* end) {
            for (; first < end; first += 64) __builtin_prefetch(first);
        });
    }

    void pack_queries() {
        __m512i rows[MAX_ROWS];
        for (int64_t part = 0; part < HEAD / (2 * PAIRS); part++) {
            for (int64_t row = 0; row < MAX_ROWS; row++)
                rows[row] = row < view_.num_rows() ? _mm512_loadu_si512(view_.query(row) + part * 2 * PAIRS)
                                                   : _mm512_setzero_si512();
            transpose(rows);
            std::memcpy(queries_ + part * TILE, rows, sizeof rows);
        }
    }

    void score_keys() {
        const auto at = [&](int64_t key) { return view_.key(key); };
        for (int64_t key = 0; key < num_steps_ * STEP_KEYS; key += STEP_KEYS) {
            fetch_next_();
            prefetch(key + KEYS_AHEAD, STEP_KEYS, at);
            const Rows first = tile_rows(key, false, at, scratch_.copies.data());
            const Rows second = tile_rows(key + KEYS, false, at, scratch_.copies.data() + KEYS * HEAD);
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t part = 0; part < HEAD / (2 * PAIRS); part++) {
                _tile_loadd(6, queries_ + part * TILE, 64);
                _tile_loadd(4, first.at + part * 2 * PAIRS, first.stride * sizeof(BFloat16));
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, second.at + part * 2 * PAIRS, second.stride * sizeof(BFloat16));
                _tile_dpbf16ps(1, 5, 6);
            }
            _tile_stored(0, scratch_.scores.data() + key * MAX_ROWS, 64);
            _tile_stored(1, scratch_.scores.data() + (key + KEYS) * MAX_ROWS, 64);
        }
    }

    void softmax() {
        I32x16 first_seen{}, last_seen{};
        int64_t all_see_from = 0, all_see_to = num_keys_ - 1;
        for (int64_t row = 0; row < view_.num_rows(); row++) {
            first_seen[row] = int32_t(view_.first_seen(row) - first_);
            last_seen[row] = int32_t(view_.last_seen(row) - first_);
            all_see_from = std::max<int64_t>(all_see_from, first_seen[row]);
            all_see_to = std::min<int64_t>(all_see_to, last_seen[row]);
        }
        float* scores = scratch_.scores.data();
        F32x16 most = broadcast(-__builtin_inff());
        for (int64_t key = 0; key < num_steps_ * STEP_KEYS; key++) {
            F32x16 score = load(scores + key * MAX_ROWS) * view_.scale();
            if (key < all_see_from || key > all_see_to) {
                const I32x16 k = I32x16{} + int32_t(key);
                score = (k >= first_seen) & (k <= last_seen) ? score : broadcast(-__builtin_inff());
            }
            store(scores + key * MAX_ROWS, score);
            most = max(most, score);
        }
        F32x16 total{};
        for (int64_t step = 0; step < num_steps_; step++) {
            fetch_next_();
            __m512i pairs[PAIRS];  // of weights of two keys, for each row
#pragma GCC unroll 16
            for (int i = 0; i < PAIRS; i++) {
                const float* at = scores + (step * STEP_KEYS + 2 * i) * MAX_ROWS;
                const F32x16 even = exp(load(at) - most), odd = exp(load(at + MAX_ROWS) - most);
                total += even + odd;
                pairs[i] = pair_up(even, odd);
            }
            transpose(pairs);
            std::memcpy(scratch_.weights.data() + step * TILE, pairs, sizeof pairs);
        }
        factor_ = 1.0f / total;
    }

    void softmax_of_few() {
        const int64_t rows = view_.num_rows(), keys = num_steps_ * STEP_KEYS;
        F32x16 most[FEW_ROWS];
        for (F32x16& row : most) row = broadcast(-__builtin_inff());
        // [keys][MAX_ROWS] becomes [keys / KEYS][FEW_ROWS][KEYS], in place.
        for (int64_t key = 0; key < keys; key += KEYS) {
            float* scores = scratch_.scores.data() + key * MAX_ROWS;
            F32x16 of_rows[FEW_ROWS];
            transpose_few(scores, of_rows);
            const I32x16 k = LANE + int32_t(key + first_);
            for (int64_t row = 0; row < rows; row++) {
                F32x16 score = of_rows[row] * view_.scale();
                const int32_t first = int32_t(view_.first_seen(row)), last = int32_t(view_.last_seen(row));
                if (key + first_ < first || key + first_ + KEYS - 1 > last)
                    score = (k >= first) & (k <= last) ? score : broadcast(-__builtin_inff());
                store(scores + row * KEYS, score);
                most[row] = max(most[row], score);
            }
        }
        F32x16 total[FEW_ROWS] = {};
        for (int64_t row = 0; row < rows; row++) most[row] = broadcast(_mm512_reduce_max_ps((__m512)most[row]));
        for (int64_t step = 0; step < num_steps_; step++) {
            fetch_next_();
            const float* scores = scratch_.scores.data() + step * STEP_KEYS * MAX_ROWS;
            for (int64_t row = 0; row < rows; row++) {
                const F32x16 first = exp(load(scores + row * KEYS) - most[row]);
                const F32x16 second = exp(load(scores + KEYS * MAX_ROWS + row * KEYS) - most[row]);
                total[row] += first + second;
                const auto rounded = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
                std::memcpy(scratch_.weights.data() + step * TILE + row * STEP_KEYS, &rounded, sizeof rounded);
            }
        }
        for (int64_t row = 0; row < rows; row++) factor_[row] = 1.0f / sum(total[row]);
    }

    // The first FEW_ROWS columns of KEYS × MAX_ROWS numbers as rows.
    static void transpose_few(const float* from, F32x16 (&rows)[FEW_ROWS]) {
        __m512 keys[4];  // quarter q of keys[i] has the columns of key 4q + i
        for (int i = 0; i < 4; i++) {
            const auto at = [&](int quarter) { return _mm_load_ps(from + (4 * quarter + i) * MAX_ROWS); };
            keys[i] = _mm512_castps128_ps512(at(0));
            keys[i] = _mm512_insertf32x4(keys[i], at(1), 1);
            keys[i] = _mm512_insertf32x4(keys[i], at(2), 2);
            keys[i] = _mm512_insertf32x4(keys[i], at(3), 3);
        }
        const __m512d low = (__m512d)_mm512_unpacklo_ps(keys[0], keys[1]), high = (__m512d)_mm512_unpackhi_ps(keys[0], keys[1]);
        const __m512d next_low = (__m512d)_mm512_unpacklo_ps(keys[2], keys[3]);
        const __m512d next_high = (__m512d)_mm512_unpackhi_ps(keys[2], keys[3]);
        rows[0] = (F32x16)_mm512_unpacklo_pd(low, next_low);
        rows[1] = (F32x16)_mm512_unpackhi_pd(low, next_low);
        rows[2] = (F32x16)_mm512_unpacklo_pd(high, next_high);
        rows[3] = (F32x16)_mm512_unpackhi_pd(high, next_high);
    }

    void sum_values() {
        constexpr int DIM_TILES = HEAD / TILE_DIMS;
        for (int first = 0; first < DIM_TILES; first += MAX_DIM_TILES) {
            if (DIM_TILES - first >= MAX_DIM_TILES) sum_dims<MAX_DIM_TILES>(first);
            else sum_dims<DIM_TILES % MAX_DIM_TILES>(first);
        }
    }

    // The sums' dimensions from tile `first` on.
    template <int TILES>
    void sum_dims(int first) {
        if constexpr (TILES > 0) {
            alignas(64) BFloat16 values[TILES * TILE];
            const auto at = [&](int64_t key) { return view_.value(key) + first * TILE_DIMS; };
#define ONEBASE_EACH_TILE(DO) DO(0) DO(1) DO(2) DO(3)
#define ONEBASE_ZERO(i) if constexpr (TILES > i) _tile_zero(i);
#define ONEBASE_MULTIPLY(i)                         \
    if constexpr (TILES > i) {                      \
        _tile_loadd(7, values + (i) * TILE, 64);    \
        _tile_dpbf16ps(i, 6, 7);                    \
    }
#define ONEBASE_STORE(i) if constexpr (TILES > i) _tile_stored(i, sums + (i) * TILE_DIMS, TILES * TILE_DIMS * 4);
            ONEBASE_EACH_TILE(ONEBASE_ZERO)
            for (int64_t step = 0; step < num_steps_; step++) {
                if (first == 0) {
                    fetch_next_();
                    prefetch(step * STEP_KEYS + KEYS_AHEAD, STEP_KEYS, at);
                }
                for (int64_t half = 0; half < 2; half++) {
                    const Rows rows = tile_rows(step * STEP_KEYS + half * KEYS, true, at, scratch_.copies.data());
                    pair_keys<TILES>(rows, values + half * TILE / 2);
                }
                _tile_loadd(6, scratch_.weights.data() + step * TILE, 64);
                ONEBASE_EACH_TILE(ONEBASE_MULTIPLY)
            }
            alignas(64) float sums[MAX_ROWS * TILES * TILE_DIMS];
            ONEBASE_EACH_TILE(ONEBASE_STORE)
#undef ONEBASE_EACH_TILE
#undef ONEBASE_ZERO
#undef ONEBASE_MULTIPLY
#undef ONEBASE_STORE
            for (int64_t row = 0; row < view_.num_rows(); row++)
                for (int tile = 0; tile < TILES; tile++)
                    store(view_.out(row) + (first + tile) * TILE_DIMS,
                          load(sums + (row * TILES + tile) * TILE_DIMS) * factor_[row]);
        }
    }

    // KEYS values as the upper or lower halves of right-hand tiles: [tile][8 pairs of keys][16 dimensions][2].
    template <int TILES>
    static void pair_keys(Rows rows, BFloat16* to) {
        for (int64_t pair = 0; pair < KEYS / 2; pair++) {
            const BFloat16 *even = rows.at + 2 * pair * rows.stride, *odd = even + rows.stride;
#pragma GCC unroll 4
            for (int tile = 0; tile < TILES; tile += 2) {
                const __m512i a = _mm512_loadu_si512(even + tile * TILE_DIMS), b = _mm512_loadu_si512(odd + tile * TILE_DIMS);
                _mm512_storeu_si512(to + tile * TILE + pair * 2 * PAIRS, interleave_low(a, b));
                _mm512_storeu_si512(to + (tile + 1) * TILE + pair * 2 * PAIRS, interleave_high(a, b));
            }
        }
    }

    const PieceView<BFloat16, HEAD> view_;
    AmxScratch& scratch_;
    const int64_t first_, num_keys_, num_steps_;
    alignas(64) BFloat16 queries_[HEAD / (2 * PAIRS) * TILE];
    F32x16 factor_{};
    FetchAhead fetch_next_;
};

}  // namespace onebase
