// Each row's best token, without the logits of all others: a screen of 8 bits says how good each token is at least and at
// most, and only those that may be the best are computed with the output head itself. So the tokens are the head's own, for
// little more than half of its reading.
//
// For a row w of the head the screen has codes c, a scale, and an error of at least ‖w - ŵ‖ with ŵ = (c - 128) · scale.
// By Cauchy and Schwarz |x·w - x·ŵ| is at most ‖x‖ · error. x itself is rounded to 16 bits, of which the high and the low
// byte are multiplied apart; the errors allow for that.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "aligned_vector.h"
#include "dense_block.h"
#include "parallel.h"
#include "simd.h"

namespace onebase {

struct BestTokens {
    const BFloat16* x;     // [rows, num_inputs]
    const BFloat16* head;  // [vocab, num_inputs]
    const uint8_t* codes;  // [vocab / 16][num_inputs / 64][16 tokens][64 inputs]
    const float* scales;   // [vocab]
    const float* errors;   // [vocab], greater than 0
    int64_t* tokens;       // [rows]
    int64_t rows, vocab, num_inputs;
};

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t BYTES_DEPTH = 64;     // inputs of a tile of bytes
constexpr int64_t TILE_BYTES = BLOCK * BYTES_DEPTH;
constexpr int64_t MAX_SCREENED = 3;     // tiles of rows that share one reading of the screen
constexpr int64_t CODES_AHEAD = 4096;   // how early the screen is asked for

enum Half { HIGH, LOW, HALVES };

// 16 rows as the screen multiplies them: rounded to 16 bits, the largest magnitude to 0x7f7f.
struct RowTile {
    const int8_t* tiles;            // [num_inputs / 64][HALVES][16 fours of inputs][16 rows][4]
    I32x16 offsets[HALVES] = {};    // what the codes' 128 adds to the sums
    F32x16 norms = {};              // ‖x‖ in steps of the rounding; infinite where x is not finite
};

struct Bounds {
    F32x16 most, least;
};

using Sums = int32_t[HALVES][BLOCK][BLOCK];  // of 16 tokens × 16 rows

void round_row(const BFloat16* x, int64_t k, int64_t row, RowTile& tile, int8_t* tiles) {
    F32x16 squares = {}, largest = {};
    for (int64_t i = 0; i < k; i += LANES) {
        const F32x16 numbers = load(x + i);
        squares += numbers * numbers;
        largest = max(largest, max(numbers, -numbers));
    }
    float most = 0;
    for (int lane = 0; lane < LANES; lane++) most = std::max(most, largest[lane]);
    const float steps = most > 0 ? 0x7f7f / most : 0.0f, norm = std::sqrt(sum(squares)) * steps;
    tile.norms[row] = std::isfinite(norm) ? norm : std::numeric_limits<float>::infinity();
    if (!std::isfinite(norm) || norm == 0) return;  // its bytes stay 0
    I32x16 totals[HALVES] = {};
    for (int64_t i = 0; i < k; i += LANES) {
        const F32x16 scaled = load(x + i) * steps;
        const I32x16 rounded = __builtin_convertvector(scaled + (scaled < 0 ? broadcast(-0.5f) : broadcast(0.5f)), I32x16);
        const I32x16 high = (rounded + 128) >> 8;
        const I32x16 halves[HALVES] = {high, rounded - (high << 8)};
        for (int half = 0; half < HALVES; half++) {
            totals[half] += halves[half];
            const I8x16 bytes = __builtin_convertvector(halves[half], I8x16);
            int8_t* to = tiles + (i / BYTES_DEPTH * HALVES + half) * TILE_BYTES + i % BYTES_DEPTH / 4 * BYTES_DEPTH + row * 4;
            for (int four = 0; four < 4; four++)
                std::memcpy(to + four * BYTES_DEPTH, reinterpret_cast<const char*>(&bytes) + 4 * four, 4);
        }
    }
    for (int half = 0; half < HALVES; half++)
        for (int lane = 0; lane < LANES; lane++) tile.offsets[half][row] += 128 * totals[half][lane];
}

#if defined(__AMX_INT8__)
template <int TILES>
void multiply_screen(const uint8_t* codes, const RowTile* rows, int64_t k, Sums* sums) {
#define ONEBASE_EACH_HALF(DO) DO(0, HIGH) DO(1, LOW) DO(2, HIGH) DO(3, LOW) DO(4, HIGH) DO(5, LOW)
#define ONEBASE_ZERO(i, half) if constexpr (TILES > i / 2) _tile_zero(i);
#define ONEBASE_MULTIPLY(i, half)                                                         \
    if constexpr (TILES > i / 2) {                                                        \
        _tile_loadd(7, rows[i / 2].tiles + (depth * HALVES + half) * TILE_BYTES, 64);     \
        _tile_dpbusd(i, 6, 7);                                                            \
    }
#define ONEBASE_STORE(i, half) if constexpr (TILES > i / 2) _tile_stored(i, sums[i / 2][half], 64);
    ONEBASE_EACH_HALF(ONEBASE_ZERO)
    for (int64_t depth = 0; depth < k / BYTES_DEPTH; depth++) {
        const uint8_t* tile = codes + depth * TILE_BYTES;
        for (int64_t line = 0; line < BLOCK; line++) __builtin_prefetch(tile + CODES_AHEAD + line * BYTES_DEPTH);
        _tile_loadd(6, tile, 64);
        ONEBASE_EACH_HALF(ONEBASE_MULTIPLY)
    }
    ONEBASE_EACH_HALF(ONEBASE_STORE)
#undef ONEBASE_EACH_HALF
#undef ONEBASE_ZERO
#undef ONEBASE_MULTIPLY
#undef ONEBASE_STORE
}
#else
template <int TILES>
void multiply_screen(const uint8_t* codes, const RowTile* rows, int64_t k, Sums* sums) {
    for (int64_t token = 0; token < BLOCK; token++) {
        __m512i totals[TILES][HALVES] = {};
        for (int64_t input = 0; input < k; input += 4) {
            const int64_t depth = input / BYTES_DEPTH, four = input % BYTES_DEPTH / 4;
            int32_t code;
            std::memcpy(&code, codes + depth * TILE_BYTES + token * BYTES_DEPTH + 4 * four, 4);
            for (int tile = 0; tile < TILES; tile++)
                for (int half = 0; half < HALVES; half++)
                    totals[tile][half] = _mm512_dpbusd_epi32(
                        totals[tile][half], _mm512_set1_epi32(code),
                        load_raw<__m512i>(rows[tile].tiles + (depth * HALVES + half) * TILE_BYTES + four * BYTES_DEPTH));
        }
        for (int tile = 0; tile < TILES; tile++)
            for (int half = 0; half < HALVES; half++) std::memcpy(sums[tile][half][token], &totals[tile][half], 64);
    }
}
#endif

void multiply_screen(int64_t tiles, const uint8_t* codes, const RowTile* rows, int64_t k, Sums* sums) {
    switch (tiles) {
        case 1: return multiply_screen<1>(codes, rows, k, sums);
        case 2: return multiply_screen<2>(codes, rows, k, sums);
        default: return multiply_screen<3>(codes, rows, k, sums);
    }
}

// How good the best of 16 tokens is at most, and at least, for each of 16 rows.
Bounds bounds(const RowTile& rows, const Sums& sums, const float* scales, const float* errors) {
    const float infinity = std::numeric_limits<float>::infinity();
    Bounds best = {broadcast(-infinity), broadcast(-infinity)};
    for (int64_t token = 0; token < BLOCK; token++) {
        const auto half = [&](Half half) {
            return __builtin_convertvector(load_raw<I32x16>(sums[half][token]) - rows.offsets[half], F32x16);
        };
        const F32x16 score = (half(HIGH) * 256.0f + half(LOW)) * scales[token], error = rows.norms * errors[token];
        best.most = max(best.most, score + error);
        best.least = max(best.least, score - error);
    }
    return best;
}

class BestTokensSearch {
public:
    explicit BestTokensSearch(const BestTokens& call)
        : call_(call), num_tiles_((call.rows + BLOCK - 1) / BLOCK), num_blocks_(call.vocab / BLOCK),
          bytes_(num_tiles_ * BLOCK * call.num_inputs * HALVES), rows_(num_tiles_),
          least_(num_tiles_, broadcast(-std::numeric_limits<float>::infinity())), most_(num_blocks_ * num_tiles_) {
        const int64_t k = call.num_inputs;
        for (int64_t tile = 0; tile < num_tiles_; tile++) {
            int8_t* tiles = bytes_.data() + tile * BLOCK * k * HALVES;
            rows_[tile].tiles = tiles;
            for (int64_t row = 0; row < std::min(BLOCK, call.rows - tile * BLOCK); row++)
                round_row(call.x + (tile * BLOCK + row) * k, k, row, rows_[tile], tiles);
        }
    }

    void run() {
        screen();
        compute(candidates());
    }

private:
    // Fills `most_` and `least_`.
    void screen() {
        const int64_t pieces = num_pieces(num_blocks_);
        std::vector<F32x16> least(pieces * num_tiles_, broadcast(-__builtin_inff()));
        run_each(pieces, [&](int64_t piece) {
#if defined(__AMX_INT8__)
            const Tiles configured;
#endif
            for (int64_t block = num_blocks_ * piece / pieces; block < num_blocks_ * (piece + 1) / pieces; block++)
                screen_block(block, least.data() + piece * num_tiles_);
        });
        for (int64_t piece = 0; piece < pieces; piece++)
            for (int64_t tile = 0; tile < num_tiles_; tile++)
                least_[tile] = max(least_[tile], least[piece * num_tiles_ + tile]);
        for (int64_t row = call_.rows; row < num_tiles_ * BLOCK; row++)  // there is none
            least_[row / BLOCK][row % BLOCK] = std::numeric_limits<float>::infinity();
    }

    void screen_block(int64_t block, F32x16* least) {
        const int64_t k = call_.num_inputs, token = block * BLOCK;
        alignas(64) Sums sums[MAX_SCREENED];
        for (int64_t first = 0; first < num_tiles_; first += MAX_SCREENED) {
            const int64_t tiles = std::min(MAX_SCREENED, num_tiles_ - first);
            multiply_screen(tiles, call_.codes + token * k, rows_.data() + first, k, sums);
            for (int64_t tile = first; tile < first + tiles; tile++) {
                const Bounds best = bounds(rows_[tile], sums[tile - first], call_.scales + token, call_.errors + token);
                most_[block * num_tiles_ + tile] = best.most;
                least[tile] = max(least[tile], best.least);
            }
        }
    }

    // The blocks of tokens that may have a row's best one, in order.
    std::vector<int64_t> candidates() const {
        std::vector<int64_t> found;
        for (int64_t block = 0; block < num_blocks_; block++)
            for (int64_t tile = 0; tile < num_tiles_; tile++)
                if (_mm512_cmp_ps_mask((__m512)most_[block * num_tiles_ + tile], (__m512)least_[tile], _CMP_GE_OQ)) {
                    found.push_back(block);
                    break;
                }
        return found;
    }

    // The best of the candidates by the head itself, of equals the first.
    void compute(const std::vector<int64_t>& blocks) const {
        const int64_t k = call_.num_inputs;
        const auto x_tiles = transpose_pairs(call_.x, call_.rows, k);
        std::vector<F32x16> logits(blocks.size() * num_tiles_);
        std::vector<I32x16> tokens(blocks.size() * num_tiles_);
        parallel(blocks.size(), [&](int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
            const Tiles configured;
#endif
            alignas(64) float sums[BLOCK * BLOCK];
            for (int64_t i = first; i < last; i++)
                for (int64_t tile = 0; tile < num_tiles_; tile++) {
                    multiply_block(1, call_.head + blocks[i] * BLOCK * k, x_tiles.data() + tile * BLOCK * k, k, sums);
                    best_of_block(blocks[i], sums, logits[i * num_tiles_ + tile], tokens[i * num_tiles_ + tile]);
                }
        });
        for (int64_t row = 0; row < call_.rows; row++) {
            float best = -std::numeric_limits<float>::infinity();
            call_.tokens[row] = 0;
            for (size_t i = 0; i < blocks.size(); i++) {
                const int64_t at = i * num_tiles_ + row / BLOCK, lane = row % BLOCK;
                if (logits[at][lane] > best) {
                    best = logits[at][lane];
                    call_.tokens[row] = tokens[at][lane];
                }
            }
        }
    }

    static void best_of_block(int64_t block, const float* sums, F32x16& logits, I32x16& tokens) {
        logits = broadcast(-std::numeric_limits<float>::infinity());
        tokens = I32x16{};
        for (int32_t token = 0; token < BLOCK; token++) {
            const F32x16 logit = load(sums + token * BLOCK);
            tokens = logit > logits ? I32x16{} + int32_t(block * BLOCK + token) : tokens;
            logits = max(logit, logits);
        }
    }

    const BestTokens& call_;
    const int64_t num_tiles_, num_blocks_;
    AlignedVector<int8_t> bytes_;
    std::vector<RowTile> rows_;
    std::vector<F32x16> least_;  // [num_tiles]: of every row, what its best token is at least
    std::vector<F32x16> most_;   // [num_blocks][num_tiles]: what the best of a block's tokens is at most
};

}  // namespace

#endif

}  // namespace onebase

// vocab a multiple of 16, num_inputs of 64. Only variants with products of bfloat16 have it, as `onebase_dense_linear`.
ONEBASE_EXPORT void onebase_best_tokens([[maybe_unused]] const onebase::BestTokens* call) {
#if defined(__AVX512BF16__)
    onebase::BestTokensSearch(*call).run();
#endif
}
