// The side path of segments of several rows by AMX, in bfloat16: what is shrunk is rounded to bfloat16, as PEFT does.
#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"
#include "lora_call.h"
#include "parallel.h"

namespace onebase {

constexpr int64_t LORA_ROWS = 16;       // of x, in a tile
constexpr int64_t LORA_DEPTH = 32;      // inputs of a tile of the shrink, and ranks of one of the expand
constexpr int64_t LORA_TILE = LORA_ROWS * LORA_DEPTH;
constexpr int64_t LORA_COLUMNS = 256;   // of y, that a piece of the expand computes

class AmxLora {
public:
    AmxLora(const LoraGroup<BFloat16>& group, const std::vector<Segment>& segments) : group_(group) {
        int64_t x_tiles = 0, shrunk_tiles = 0;
        for (const Segment& segment : segments) {
            const int64_t row_tiles = (segment.stop - segment.start + LORA_ROWS - 1) / LORA_ROWS;
            for (int64_t tile = 0; tile < row_tiles; tile++) packs_.push_back({segment, tile, x_tiles + tile * depth()});
            const BFloat16* a = group.a(segment);
            const BFloat16 *b = group.b(segment), *epilogue = group.epilogues(segment);
            int64_t column = 0;
            for (int64_t slice = 0; slice < group.num_slices; slice++) {
                const int64_t rank = group.ranks(segment)[slice], width = group.widths[slice];
                const bool has_epilogue = group.has_epilogue(segment, slice);
                for (int64_t first = 0; first < rank; first += LORA_DEPTH)
                    shrinks_.push_back({row_tiles, x_tiles, shrunk_tiles + first / LORA_DEPTH * row_tiles,
                                        a + first * group.num_inputs, std::min(LORA_DEPTH, rank - first)});
                for (int64_t first = 0; (rank || has_epilogue) && first < width; first += LORA_COLUMNS)
                    expands_.push_back({segment, row_tiles, shrunk_tiles, b + first, rank, width,
                                        std::min(LORA_COLUMNS, width - first), column + first,
                                        has_epilogue ? epilogue + first : nullptr});
                if (has_epilogue) epilogue += 2 * width;
                a += rank * group.num_inputs;
                b += rank * width;
                column += width;
                shrunk_tiles += steps(rank) * row_tiles;
            }
            x_tiles += row_tiles * depth();
        }
        x_.resize(x_tiles * LORA_TILE);
        shrunk_.resize(shrunk_tiles * LORA_TILE);
    }

    // Which groups it carries: whole tiles.
    static bool carries(const LoraGroup<BFloat16>& group) {
        return group.num_inputs % LORA_DEPTH == 0 &&
               std::all_of(group.widths, group.widths + group.num_slices, [](int64_t n) { return n % LORA_DEPTH == 0; });
    }

    void run() {
        each(packs_, [this](const Pack& piece) { pack(piece); });
        each(shrinks_, [this](const Shrink& piece) { shrink(piece); });
        each(expands_, [this](const Expand& piece) { expand(piece); });
    }

private:
    // Positions count tiles: of x_ where they say x, of shrunk_ where they say shrunk.
    struct Pack {
        Segment segment;
        int64_t row_tile, x;
    };
    struct Shrink {
        int64_t row_tiles, x, shrunk;
        const BFloat16* a;  // [ranks, num_inputs]
        int64_t ranks;
    };
    struct Expand {
        Segment segment;
        int64_t row_tiles, shrunk;
        const BFloat16* b;  // [rank, width], at the piece's first column
        int64_t rank, width, columns, y_column;
        const BFloat16* gain;  // of the slice's epilogue, at the piece's first column; null if it has none
    };

    int64_t depth() const { return group_.num_inputs / LORA_DEPTH; }
    static int64_t steps(int64_t rank) { return (rank + LORA_DEPTH - 1) / LORA_DEPTH; }

    template <class Piece, class Body>
    static void each(const std::vector<Piece>& pieces, Body body) {
        parallel(int64_t(pieces.size()), [&](int64_t first, int64_t last) {
            const Tiles tiles;
            for (int64_t i = first; i < last; i++) body(pieces[i]);
        });
    }

    // 16 rows of x as right operands; rows past the segment's last are zero.
    void pack(const Pack& piece) {
        const int64_t k = group_.num_inputs, first = piece.segment.start + piece.row_tile * LORA_ROWS;
        const int64_t count = std::min(LORA_ROWS, piece.segment.stop - first);
        for (int64_t part = 0; part < depth(); part++) {
            __m512i rows[LORA_ROWS] = {};
            for (int64_t row = 0; row < count; row++)
                rows[row] = _mm512_loadu_si512(group_.x + (first + row) * k + part * LORA_DEPTH);
            transpose(rows);
            std::memcpy(x_.data() + (piece.x + part) * LORA_TILE, rows, sizeof rows);
        }
    }

    // Up to 32 ranks of all rows: A · xᵀ, turned into left operands.
    void shrink(const Shrink& piece) {
        const int64_t k = group_.num_inputs;
        const BFloat16* a = piece.a;
        thread_local AlignedVector<BFloat16> whole;
        if (piece.ranks < LORA_DEPTH) {  // what follows the last rank may be anything, or not there
            whole.assign(LORA_DEPTH * k, BFloat16{});
            std::copy_n(a, piece.ranks * k, whole.data());
            a = whole.data();
        }
        for (int64_t tile = 0; tile < piece.row_tiles; tile++) {
            const BFloat16* x = x_.data() + (piece.x + tile * depth()) * LORA_TILE;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t part = 0; part < depth(); part++) {
                _tile_loadd(6, x + part * LORA_TILE, 64);
                _tile_loadd(4, a + part * LORA_DEPTH, k * sizeof(BFloat16));
                _tile_dpbf16ps(0, 4, 6);
                if (piece.ranks <= LORA_ROWS) continue;
                _tile_loadd(5, a + LORA_ROWS * k + part * LORA_DEPTH, k * sizeof(BFloat16));
                _tile_dpbf16ps(1, 5, 6);
            }
            alignas(64) float products[LORA_DEPTH][LORA_ROWS];
            _tile_stored(0, products, 64);
            _tile_stored(1, products + LORA_ROWS, 64);
            __m512i pairs[LORA_ROWS];
            for (int64_t i = 0; i < LORA_ROWS; i++) pairs[i] = pair_up(load(products[2 * i]), load(products[2 * i + 1]));
            transpose(pairs);
            std::memcpy(shrunk_.data() + (piece.shrunk + tile) * LORA_TILE, pairs, sizeof pairs);
        }
    }

    void expand(const Expand& piece) {
        const int64_t rows = piece.segment.stop - piece.segment.start, stride = group_.num_outputs;
        thread_local AlignedVector<BFloat16> b;
        b.resize(steps(piece.rank) * 2 * LORA_TILE);
        for (int64_t column = 0; column < piece.columns; column += 2 * LANES) {
            pair_ranks(piece, column, b.data());
            for (int64_t tile = 0; tile < piece.row_tiles; tile++) {
                _tile_zero(0);
                _tile_zero(1);
                for (int64_t step = 0; step < steps(piece.rank); step++) {
                    _tile_loadd(4, shrunk_.data() + (piece.shrunk + step * piece.row_tiles + tile) * LORA_TILE, 64);
                    _tile_loadd(6, b.data() + step * 2 * LORA_TILE, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, b.data() + (step * 2 + 1) * LORA_TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                alignas(64) float sums[2][LORA_ROWS][LANES];
                _tile_stored(0, sums[0], 64);
                _tile_stored(1, sums[1], 64);
                const int64_t first = tile * LORA_ROWS;
                for (int64_t row = 0; row < std::min(LORA_ROWS, rows - first); row++) {
                    BFloat16* y = group_.y + (piece.segment.start + first + row) * stride + piece.y_column + column;
                    for (int64_t half = 0; half < 2; half++) {
                        F32x16 total = load(y + half * LANES) + load(sums[half][row]);
                        if (piece.gain) total = finish(total, piece.gain + column + half * LANES, piece.width);
                        store(y + half * LANES, total);
                    }
                }
            }
        }
    }

    // 32 columns of B as right operands, two for every 32 ranks; ranks past the last are zero.
    static void pair_ranks(const Expand& piece, int64_t column, BFloat16* to) {
        const auto row = [&](int64_t rank) {
            return rank < piece.rank ? _mm512_loadu_si512(piece.b + rank * piece.width + column) : _mm512_setzero_si512();
        };
        for (int64_t rank = 0; rank < steps(piece.rank) * LORA_DEPTH; rank += 2) {
            BFloat16* pair = to + rank / LORA_DEPTH * 2 * LORA_TILE + rank % LORA_DEPTH * LORA_ROWS;
            const __m512i even = row(rank), odd = row(rank + 1);
            _mm512_storeu_si512(pair, interleave_low(even, odd));
            _mm512_storeu_si512(pair + LORA_TILE, interleave_high(even, odd));
        }
    }

    const LoraGroup<BFloat16>& group_;
    std::vector<Pack> packs_;
    std::vector<Shrink> shrinks_;
    std::vector<Expand> expands_;
    AlignedVector<BFloat16> x_, shrunk_;
};

}  // namespace onebase
