// The side path of segments of several rows by AMX, in bfloat16: what is shrunk is rounded to bfloat16, as PEFT does.
#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"
#include "lora_call.h"
#include "side_path.h"

namespace onebase {

constexpr int64_t LORA_ROWS = 16;       // of x, in a tile
constexpr int64_t LORA_DEPTH = 32;      // inputs of a tile of the shrink, and ranks of one of the expand
constexpr int64_t LORA_TILE = LORA_ROWS * LORA_DEPTH;
constexpr int64_t LORA_COLUMNS = 256;   // of y, that a piece of the expand computes
constexpr size_t MANY_TILES = 4;        // of rows: enough pieces for all threads without dividing ranks

class AmxLora {
public:
    AmxLora(const LoraGroup<BFloat16>& group, const std::vector<Segment>& segments) : group_(group) {
        int64_t tiles = 0;
        for (const Segment& segment : segments) {
            const int64_t row_tiles = (segment.stop - segment.start + LORA_ROWS - 1) / LORA_ROWS;
            const int64_t total_rank = group.total_rank(segment);
            for (int64_t tile = 0; tile < row_tiles; tile++)
                shrinks_.push_back({segment, tile, tiles + tile * steps(total_rank), 0, total_rank});
            add_expands(segment, row_tiles, tiles);
            tiles += row_tiles * steps(total_rank);
        }
        if (shrinks_.size() < MANY_TILES) divide_ranks();
        shrunk_.resize(tiles * LORA_TILE);
    }

    // Which groups it carries: whole tiles.
    static bool carries(const LoraGroup<BFloat16>& group) {
        return group.num_inputs % LORA_DEPTH == 0 &&
               std::all_of(group.widths, group.widths + group.num_slices, [](int64_t n) { return n % LORA_DEPTH == 0; });
    }

    // The two passes, piece by piece, by threads that hold `Tiles`; all shrinks come before the first expand.
    int64_t num_shrinks() const { return int64_t(shrinks_.size()); }
    int64_t num_expands() const { return int64_t(expands_.size()); }
    void shrink(int64_t piece) { shrink(shrinks_[piece]); }
    void expand(int64_t piece, BFloat16* y) const { expand(expands_[piece], y); }

    // What they read, as side_path.h has it; what several tiles of rows read is told once.
    void add_shrink_runs(int64_t i, std::vector<Run>& runs) const {
        const Shrink& piece = shrinks_[i];
        if (piece.row_tile) return;
        const BFloat16* a = group_.a(piece.segment);
        add_rows(runs, a, piece.first_rank, piece.last_rank, group_.num_inputs, group_.num_inputs);
    }
    void add_expand_runs(int64_t i, std::vector<Run>& runs) const {
        const Expand& piece = expands_[i];
        add_rows(runs, piece.b, 0, piece.last_rank - piece.first_rank, piece.columns, piece.width);
    }

private:
    // 16 rows' products with some ranks of A, of all slices together.
    struct Shrink {
        Segment segment;
        int64_t row_tile;
        int64_t shrunk;  // the row tile's first tile in shrunk_, one for every 32 ranks
        int64_t first_rank, last_rank;
    };
    // Some columns of a slice, for all rows of a segment.
    struct Expand {
        Segment segment;
        int64_t row_tiles, total_rank, shrunk;
        int64_t first_rank, last_rank;  // the slice's
        const BFloat16* b;              // [rank, width], at the piece's first column
        int64_t width, columns, y_column;
        const BFloat16* gain;  // of the slice's epilogue, at the piece's first column; null if it has none
    };
    // 16 rows and 32 columns on their way to y.
    struct Products {
        alignas(64) float sums[2][LORA_ROWS][LANES];
        int64_t rows = 0;
        BFloat16* y;
        const BFloat16* gain;
    };

    static int64_t steps(int64_t rank) { return (rank + LORA_DEPTH - 1) / LORA_DEPTH; }

    void add_expands(const Segment& segment, int64_t row_tiles, int64_t shrunk) {
        const int64_t total_rank = group_.total_rank(segment);
        group_.each_slice(segment, [&](const LoraSlice<BFloat16>& slice) {
            for (int64_t column = 0; column < slice.width; column += LORA_COLUMNS)
                expands_.push_back({segment, row_tiles, total_rank, shrunk, slice.first_rank,
                                    slice.first_rank + slice.rank, slice.b + column, slice.width,
                                    std::min(LORA_COLUMNS, slice.width - column), slice.first_column + column,
                                    slice.gain ? slice.gain + column : nullptr});
        });
    }

    void divide_ranks() {
        std::vector<Shrink> parts;
        for (const Shrink& piece : shrinks_)
            for (int64_t rank = 0; rank < piece.last_rank; rank += LORA_DEPTH) {
                parts.push_back(piece);
                parts.back().first_rank = rank;
                parts.back().last_rank = std::min(rank + LORA_DEPTH, piece.last_rank);
            }
        shrinks_ = parts;
    }

    // A · xᵀ, turned into left operands.
    void shrink(const Shrink& piece) {
        const int64_t k = group_.num_inputs;
        thread_local AlignedVector<BFloat16> x, last_rows;
        x.resize(LORA_ROWS * k);
        pack(piece, x.data());
        for (int64_t rank = piece.first_rank; rank < piece.last_rank; rank += LORA_DEPTH) {
            const BFloat16 *upper = group_.a(piece.segment) + rank * k, *lower = upper + LORA_ROWS * k;
            const int64_t ranks = std::min(LORA_DEPTH, piece.last_rank - rank);
            if (ranks % LORA_ROWS) {  // what follows the last rank may be anything, or not there
                const BFloat16*& rest = ranks > LORA_ROWS ? lower : upper;
                last_rows.assign(LORA_ROWS * k, BFloat16{});
                std::copy_n(rest, ranks % LORA_ROWS * k, last_rows.data());
                rest = last_rows.data();
            }
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t input = 0; input < k; input += LORA_DEPTH) {
                _tile_loadd(6, x.data() + input * LORA_ROWS, 64);
                _tile_loadd(4, upper + input, k * sizeof(BFloat16));
                _tile_dpbf16ps(0, 4, 6);
                if (ranks <= LORA_ROWS) continue;
                _tile_loadd(5, lower + input, k * sizeof(BFloat16));
                _tile_dpbf16ps(1, 5, 6);
            }
            alignas(64) float products[LORA_DEPTH][LORA_ROWS];
            _tile_stored(0, products, 64);
            _tile_stored(1, products + LORA_ROWS, 64);
            __m512i pairs[LORA_ROWS];
            for (int64_t i = 0; i < LORA_ROWS; i++) pairs[i] = pair_up(load(products[2 * i]), load(products[2 * i + 1]));
            transpose(pairs);
            std::memcpy(shrunk_.data() + (piece.shrunk + rank / LORA_DEPTH) * LORA_TILE, pairs, sizeof pairs);
        }
    }

    // 16 rows of x as right operands; rows past the segment's last are zero.
    void pack(const Shrink& piece, BFloat16* to) const {
        const int64_t k = group_.num_inputs, first = piece.segment.start + piece.row_tile * LORA_ROWS;
        const int64_t count = std::min(LORA_ROWS, piece.segment.stop - first);
        for (int64_t input = 0; input < k; input += LORA_DEPTH) {
            __m512i rows[LORA_ROWS] = {};
            for (int64_t row = 0; row < count; row++) rows[row] = _mm512_loadu_si512(group_.x + (first + row) * k + input);
            transpose(rows);
            std::memcpy(to + input * LORA_ROWS, rows, sizeof rows);
        }
    }

    void expand(const Expand& piece, BFloat16* y) const {
        const int64_t rows = piece.segment.stop - piece.segment.start, stride = group_.num_outputs;
        const int64_t first_step = piece.first_rank / LORA_DEPTH, last_step = steps(piece.last_rank);
        thread_local AlignedVector<BFloat16> b;
        b.resize((last_step - first_step) * 2 * LORA_TILE);
        Products both[2];
        int64_t turn = 0;
        for (int64_t column = 0; column < piece.columns; column += 2 * LANES) {
            pair_ranks(piece, column, b.data());
            for (int64_t tile = 0; tile < piece.row_tiles; tile++, turn++) {
                const BFloat16* shrunk = shrunk_.data() + (piece.shrunk + tile * steps(piece.total_rank)) * LORA_TILE;
                BFloat16* tile_y = y + (piece.segment.start + tile * LORA_ROWS) * stride + piece.y_column + column;
                const int64_t tile_rows = std::min(LORA_ROWS, rows - tile * LORA_ROWS);
                for (int64_t row = 0; row < tile_rows; row++) __builtin_prefetch(tile_y + row * stride);
                _tile_zero(0);
                _tile_zero(1);
                for (int64_t step = first_step; step < last_step; step++) {
                    const BFloat16* pairs = b.data() + (step - first_step) * 2 * LORA_TILE;
                    _tile_loadd(4, shrunk + step * LORA_TILE, 64);
                    _tile_loadd(6, pairs, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, pairs + LORA_TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                add(both[(turn + 1) % 2], piece.width);  // meanwhile: what AMX stores can be loaded only long after
                Products& now = both[turn % 2];
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
    void add(const Products& products, int64_t width) const {
        for (int64_t row = 0; row < products.rows; row++)
            for (int64_t half = 0; half < 2; half++) {
                BFloat16* y = products.y + row * group_.num_outputs + half * LANES;
                F32x16 total = load(y) + load(products.sums[half][row]);
                if (products.gain) total = finish(total, products.gain + half * LANES, width);
                store(y, total);
            }
    }

    // 32 columns of B as right operands, two for every 32 ranks of all slices; those of other slices are zero.
    static void pair_ranks(const Expand& piece, int64_t column, BFloat16* to) {
        const auto row = [&](int64_t rank) {
            return rank >= piece.first_rank && rank < piece.last_rank
                       ? _mm512_loadu_si512(piece.b + (rank - piece.first_rank) * piece.width + column)
                       : _mm512_setzero_si512();
        };
        const int64_t first = piece.first_rank / LORA_DEPTH * LORA_DEPTH, last = steps(piece.last_rank) * LORA_DEPTH;
        for (int64_t rank = first; rank < last; rank += 2) {
            BFloat16* pair = to + (rank - first) / LORA_DEPTH * 2 * LORA_TILE + rank % LORA_DEPTH * LORA_ROWS;
            const __m512i even = row(rank), odd = row(rank + 1);
            _mm512_storeu_si512(pair, interleave_low(even, odd));
            _mm512_storeu_si512(pair + LORA_TILE, interleave_high(even, odd));
        }
    }

    const LoraGroup<BFloat16> group_;
    std::vector<Shrink> shrinks_;
    std::vector<Expand> expands_;
    AlignedVector<BFloat16> shrunk_;
};

}  // namespace onebase
