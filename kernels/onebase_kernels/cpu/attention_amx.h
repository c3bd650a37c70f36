// Attention in bfloat16 by AMX: 16 keys times 16 rows at a time, whatever number of rows there really is.
//
// Scores are computed as Kᵀ's rows lie, [key][row], so that softmax goes down columns without a single sum across lanes.
// The weights are then rounded to bfloat16 and transposed, for AMX to multiply the values with.
#pragma once

#include "amx.h"
#include "attention_call.h"

namespace onebase {

constexpr int64_t KEYS = 16;           // of a tile of scores
constexpr int64_t STEP_KEYS = 32;      // of a product of weights and values
constexpr int64_t PAIRS = 16;          // of numbers, in a row of a tile
constexpr int64_t TILE = MAX_ROWS * 2 * PAIRS;  // numbers of a bfloat16 tile
constexpr int64_t TILE_DIMS = 16;      // of a tile of values
constexpr int64_t KEYS_AHEAD = 128;    // fetched before they are needed
constexpr int MAX_DIM_TILES = 4;       // as many sums as there are registers for, besides the operands'

// Memory of one thread, kept between its pieces.
struct AmxScratch {
    AlignedVector<float> scores;      // [keys][MAX_ROWS]
    AlignedVector<BFloat16> weights;  // [keys / STEP_KEYS][MAX_ROWS][STEP_KEYS]
    AlignedVector<BFloat16> copies;   // keys or values that do not lie as they must
};

template <int HEAD>
class AmxAttention {
    static_assert(HEAD % (2 * PAIRS) == 0);

public:
    AmxAttention(const Attention& a, const Step& step, const Piece& piece, AmxScratch& scratch)
        : view_(a, step, piece), scratch_(scratch), first_(view_.first_key() / KEYS * KEYS),
          num_keys_(view_.last_key() + 1 - first_), num_steps_((num_keys_ + STEP_KEYS - 1) / STEP_KEYS) {}

    // Has the memory fetch what the piece reads first, while another one is computed.
    void prefetch() const {
        prefetch(0, KEYS_AHEAD, [&](int64_t key) { return view_.key(key); });
        prefetch(0, KEYS_AHEAD, [&](int64_t key) { return view_.value(key); });
    }

    void run() {
        scratch_.scores.resize(num_steps_ * STEP_KEYS * MAX_ROWS);
        scratch_.weights.resize(num_steps_ * TILE);
        scratch_.copies.resize(STEP_KEYS * HEAD);
        pack_queries();
        score_keys();
        // The scale comes after, so the cap is taken without it.
        if (view_.softcap())
            cap_scores(scratch_.scores.data(), num_steps_ * STEP_KEYS * MAX_ROWS, view_.softcap() / view_.scale());
        softmax();
        sum_values();
    }

private:
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

    // A head of each token is no stream to the CPU, so it is told what comes next.
    template <class At>
    void prefetch(int64_t key, int64_t count, At at) const {
        const int64_t last = std::min(key + count, num_keys_);
        for (; key < last; key++)
            for (int64_t i = 0; i < HEAD; i += 2 * PAIRS) __builtin_prefetch(at(first_ + key) + i);
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
                if (first == 0) prefetch(step * STEP_KEYS + KEYS_AHEAD, STEP_KEYS, at);
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
};

}  // namespace onebase
