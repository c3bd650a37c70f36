// The side path of segments of several rows by AMX, in bfloat16: what is shrunk is rounded to bfloat16, as PEFT does.
#pragma once

#include <algorithm>
#include <vector>

#include "linear_many.h"
#include "lora_call.h"
#include "side_path.h"

namespace onebase {

constexpr int64_t LORA_DEPTH = 32;      // ranks of a tile of the expand
constexpr int64_t LORA_TILE = M_TILE * LORA_DEPTH;
constexpr int64_t LORA_ROWS = 64;       // of x, for which a piece of the shrink puts A into order
constexpr int64_t LORA_COLUMNS = 256;   // of y, that a piece of the expand computes

template <class M>
class AmxLora {
public:
    AmxLora(const LoraGroup<BFloat16, M>& group, const std::vector<Segment>& segments) : group_(group) {
        int64_t numbers = 0;
        for (const Segment& segment : segments) {
            const int64_t total_rank = group.total_rank(segment), stride = steps(total_rank) * LORA_DEPTH;
            for (int64_t row = segment.start; row < segment.stop; row += LORA_ROWS)
                shrinks_.push_back({segment, row, std::min(row + LORA_ROWS, segment.stop), stride,
                                    numbers + (row - segment.start) * stride, 0, total_rank});
            add_expands(segment, stride, numbers);
            numbers += row_tiles(segment) * M_TILE * stride;
        }
        if (num_shrinks() < 2 * num_threads()) divide_ranks();
        shrunk_.resize(numbers);
    }

    // Which groups it carries: whole tiles.
    static bool carries(const LoraGroup<BFloat16, M>& group) {
        return group.num_inputs % K_TILE == 0 &&
               std::all_of(group.widths, group.widths + group.num_slices, [](int64_t n) { return n % (2 * BLOCK_N) == 0; });
    }

    // The two passes, piece by piece, by threads that hold `Tiles`; all shrinks come before the first expand.
    int64_t num_shrinks() const { return int64_t(shrinks_.size()); }
    int64_t num_expands() const { return int64_t(expands_.size()); }
    void shrink(int64_t piece) { shrink(shrinks_[piece]); }
    void expand(int64_t piece, BFloat16* y) const { expand(expands_[piece], y); }

    // What they read, as side_path.h has it; what several pieces read is told once.
    void add_shrink_runs(int64_t i, std::vector<Run>& runs) const {
        const Shrink& piece = shrinks_[i];
        if (piece.start > piece.segment.start) return;
        const M* a = group_.a(piece.segment);
        add_rows(runs, a, piece.first_rank, piece.last_rank, group_.num_inputs, group_.num_inputs);
    }
    void add_expand_runs(int64_t i, std::vector<Run>& runs) const {
        const Expand& piece = expands_[i];
        add_rows(runs, piece.b, 0, piece.last_rank - piece.first_rank, piece.columns, piece.width);
    }

private:
    // Some rows' products with some ranks of A, of all slices together.
    struct Shrink {
        Segment segment;
        int64_t start, stop;  // rows
        int64_t stride;       // of rows in shrunk_
        int64_t shrunk;       // the first row's first number in shrunk_
        int64_t first_rank, last_rank;
    };
    // Some columns of a slice, for all rows of a segment.
    struct Expand {
        Segment segment;
        int64_t stride, shrunk;         // as in Shrink, of the segment's first row
        int64_t first_rank, last_rank;  // the slice's
        const M* b;                     // [rank, width], at the piece's first column
        int64_t width, columns, y_column;
        const BFloat16* gain;  // of the slice's epilogue, at the piece's first column; null if it has none
    };
    // 16 rows and 32 columns on their way to y.
    struct Update {
        alignas(64) float sums[2][M_TILE][LANES];
        int64_t rows = 0;
        BFloat16* y;
        const BFloat16* gain;
    };

    static int64_t steps(int64_t rank) { return (rank + LORA_DEPTH - 1) / LORA_DEPTH; }

    static int64_t row_tiles(const Segment& segment) { return (segment.stop - segment.start + M_TILE - 1) / M_TILE; }

    void add_expands(const Segment& segment, int64_t stride, int64_t shrunk) {
        group_.each_slice(segment, [&](const LoraSlice<BFloat16, M>& slice) {
            for (int64_t column = 0; column < slice.width; column += LORA_COLUMNS)
                expands_.push_back({segment, stride, shrunk, slice.first_rank, slice.first_rank + slice.rank,
                                    slice.b + column, slice.width, std::min(LORA_COLUMNS, slice.width - column),
                                    slice.first_column + column, slice.gain ? slice.gain + column : nullptr});
        });
    }

    void divide_ranks() {
        std::vector<Shrink> parts;
        for (const Shrink& piece : shrinks_)
            for (int64_t rank = 0; rank < piece.last_rank; rank += BLOCK_N) {
                parts.push_back(piece);
                parts.back().first_rank = rank;
                parts.back().last_rank = std::min(rank + BLOCK_N, piece.last_rank);
            }
        shrinks_ = parts;
    }

    // x · Aᵀ, [rows, ranks], 32 ranks at a time.
    void shrink(const Shrink& piece) {
        const int64_t k = group_.num_inputs;
        const RowTiles rows(group_.x + piece.start * k, piece.stop - piece.start, k);
        thread_local AlignedVector<BFloat16> a;
        a.resize(2 * BLOCK_N * k);
        for (int64_t rank = piece.first_rank; rank < piece.last_rank; rank += 2 * BLOCK_N) {
            const int64_t blocks = piece.last_rank - rank > BLOCK_N ? 2 : 1;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = rank + block * BLOCK_N;
                const int64_t ranks = std::min(BLOCK_N, piece.last_rank - first);
                order_tiles(scaled(piece.segment, first, ranks), ranks, k, a.data() + block * BLOCK_N * k);
            }
            multiply_many(rows, k, a.data(), blocks, nullptr, shrunk_.data() + piece.shrunk + rank, piece.stride);
        }
    }

    // Some ranks of A, of all slices together, with the scales of A and B.
    const BFloat16* scaled(const Segment& segment, int64_t first_rank, int64_t ranks) const {
        const int64_t k = group_.num_inputs;
        const M* a = group_.a(segment) + first_rank * k;
        if constexpr (!LoraGroup<BFloat16, M>::IS_INT8) return a;
        else {
            thread_local AlignedVector<BFloat16> numbers;
            numbers.resize(ranks * k);
            for (int64_t rank = 0; rank < ranks; rank++) {
                const float scale = group_.scale(segment, first_rank + rank);
                for (int64_t i = rank * k; i < (rank + 1) * k; i += LANES) store(numbers.data() + i, load(a + i) * scale);
            }
            return numbers.data();
        }
    }

    void expand(const Expand& piece, BFloat16* y) const {
        const int64_t rows = piece.segment.stop - piece.segment.start, stride = group_.num_outputs;
        const int64_t first_step = piece.first_rank / LORA_DEPTH, last_step = steps(piece.last_rank);
        thread_local AlignedVector<BFloat16> b;
        b.resize((last_step - first_step) * 2 * LORA_TILE);
        Update both[2];
        int64_t turn = 0;
        for (int64_t column = 0; column < piece.columns; column += 2 * LANES) {
            pair_ranks(piece, column, b.data());
            for (int64_t row = 0; row < rows; row += M_TILE, turn++) {
                const BFloat16* shrunk = shrunk_.data() + piece.shrunk + row * piece.stride;
                BFloat16* tile_y = y + (piece.segment.start + row) * stride + piece.y_column + column;
                const int64_t tile_rows = std::min(M_TILE, rows - row);
                for (int64_t i = 0; i < tile_rows; i++) __builtin_prefetch(tile_y + i * stride);
                _tile_zero(0);
                _tile_zero(1);
                for (int64_t step = first_step; step < last_step; step++) {
                    const BFloat16* pairs = b.data() + (step - first_step) * 2 * LORA_TILE;
                    _tile_loadd(4, shrunk + step * LORA_DEPTH, piece.stride * sizeof(BFloat16));
                    _tile_loadd(6, pairs, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, pairs + LORA_TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                add(both[(turn + 1) % 2], piece.width);  // meanwhile: what AMX stores can be loaded only long after
                Update& now = both[turn % 2];
                now.rows = tile_rows;
                now.y = tile_y;
                now.gain = piece.gain ? piece.gain + column : nullptr;
                _tile_stored(0, now.sums[0], 64);
                _tile_stored(1, now.sums[1], 64);
            }
        }
        add(both[(turn + 1) % 2], piece.width);
    }

    // y += products, then the epilogue.
    void add(const Update& products, int64_t width) const {
        for (int64_t row = 0; row < products.rows; row++)
            for (int64_t half = 0; half < 2; half++) {
                BFloat16* y = products.y + row * group_.num_outputs + half * LANES;
                F32x16 total = load(y) + load(products.sums[half][row]);
                if (products.gain) total = finish(total, products.gain + half * LANES, width);
                store(y, total);
            }
    }

    // 32 numbers, without their scale.
    static __m512i in_bfloat16(const BFloat16* numbers) { return _mm512_loadu_si512(numbers); }
    static __m512i in_bfloat16(const Int8Code* numbers) {
        return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(numbers + LANES), (__m512)load(numbers));
    }

    // 32 columns of B as right operands, two for every 32 ranks of all slices; those of other slices are zero.
    static void pair_ranks(const Expand& piece, int64_t column, BFloat16* to) {
        const auto row = [&](int64_t rank) {
            return rank >= piece.first_rank && rank < piece.last_rank
                       ? in_bfloat16(piece.b + (rank - piece.first_rank) * piece.width + column)
                       : _mm512_setzero_si512();
        };
        const int64_t first = piece.first_rank / LORA_DEPTH * LORA_DEPTH, last = steps(piece.last_rank) * LORA_DEPTH;
        for (int64_t rank = first; rank < last; rank += 2) {
            BFloat16* pair = to + (rank - first) / LORA_DEPTH * 2 * LORA_TILE + rank % LORA_DEPTH * BLOCK_N;
            const __m512i even = row(rank), odd = row(rank + 1);
            _mm512_storeu_si512(pair, interleave_low(even, odd));
            _mm512_storeu_si512(pair + LORA_TILE, interleave_high(even, odd));
        }
    }

    const LoraGroup<BFloat16, M> group_;
    std::vector<Shrink> shrinks_;
    std::vector<Expand> expands_;
    AlignedVector<BFloat16> shrunk_;
};

}  // namespace onebase
