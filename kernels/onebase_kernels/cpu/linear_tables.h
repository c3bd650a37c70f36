// Products of some dozens of rows of bfloat16 and 4-bit weights by AMX. Weights are the left operand here, whose registers
// hold inputs of one output each, and these share a scale: what the 16 codes stand for, times that scale, is a table of its
// own, and decoding is looking up 32 weights at a time. So it costs half of what scaling each weight does (linear_amx.h).
// The price is that x has to be put into order, and the sums turned round, which many rows do not repay.
#pragma once

#include <algorithm>
#include <atomic>

#include "linear_many.h"

namespace onebase {

constexpr int64_t TABLE_INPUTS = 64;   // decoded at a time: two left tiles
constexpr int64_t CHUNK_INPUTS = 320;  // whose weights the first cache holds, beside x as it passes by
constexpr int64_t LEFT_TILE = BLOCK_N * K_TILE;

// 64 inputs of 16 outputs as two left tiles, [2][16 outputs][32 inputs], out of the rows of codes that blockwise_weight.h
// describes: input 8 i + 2 q + p is nibble q of row i, and becomes number 16 (q % 2) + 2 i + p of tile q / 2. `table(output)`
// is what the codes stand for in this output, as 32 numbers: twice 16 of them, or, where inputs 32 and above have others,
// 16 for either half.
template <bool ONE_TABLE, class Table>
[[gnu::always_inline]] inline void decode_by_tables(const uint8_t* codes, Table table, BFloat16* to) {
    constexpr int64_t ROWS = TABLE_INPUTS / ROW_INPUTS;
    __m512i rows[ROWS], pairs[ROWS], fours[2][4];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
        __builtin_prefetch(codes + i * ROW_BYTES + BYTES_AHEAD);
        rows[i] = _mm512_loadu_si512(codes + i * ROW_BYTES);
    }
    for (int i = 0; i < ROWS; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2; i++) {
            fours[half][2 * i] = _mm512_unpacklo_epi64(pairs[4 * half + i], pairs[4 * half + i + 2]);
            fours[half][2 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * half + i], pairs[4 * half + i + 2]);
        }
    const __m512i odd_nibbles = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i shifts[2] = {odd_nibbles, _mm512_add_epi16(odd_nibbles, _mm512_set1_epi16(8))};
    constexpr int64_t SECOND = 0x0010'0010'0010'0010;
    const __m512i second_table = _mm512_setr_epi64(0, 0, SECOND, SECOND, 0, 0, SECOND, SECOND);
    const __m512i nibble = _mm512_set1_epi16(15);
#pragma GCC unroll 16
    for (int64_t output = 0; output < BLOCK_N; output++) {
        const int64_t lane = output / 4 * 2;  // the 8 words of either half that are this output's, twice
        const __m512i order = _mm512_setr_epi64(lane, lane + 1, lane + 8, lane + 9, lane, lane + 1, lane + 8, lane + 9);
        const __m512i words = _mm512_permutex2var_epi64(fours[0][output % 4], order, fours[1][output % 4]);
        const __m512i values = table(output);
#pragma GCC unroll 2
        for (int tile = 0; tile < 2; tile++) {
            __m512i index = _mm512_srlv_epi16(words, shifts[tile]);
            if constexpr (!ONE_TABLE) index = _mm512_or_si512(_mm512_and_si512(index, nibble), second_table);
            _mm512_store_si512(to + tile * LEFT_TILE + output * K_TILE, _mm512_permutexvar_epi16(index, values));
        }
    }
}

// A block of outputs, 64 inputs at a time.
template <class Group>
class TableDecoder {
public:
    TableDecoder(const Group& group, int64_t block)
        : scales_(group, block), codebook_(group.codebook()), rest_(group.num_inputs / TABLE_INPUTS),
          codes_(group.codes + block * (group.num_inputs / Group::BLOCK_K) * TILE_BYTES<Group>) {
        read_terms(0);
    }

    void next(BFloat16* to) {
        const Terms& terms = terms_[at_ % 2];
        if (++at_ < rest_) read_terms(at_);  // meanwhile, for they come from several places
        decode_by_tables<PARTS == 1>(codes_, [&](int64_t output) { return table(terms, output); }, to);
        codes_ += TABLE_INPUTS / ROW_INPUTS * ROW_BYTES;
    }

private:
    static constexpr int64_t PARTS = TABLE_INPUTS / Group::BLOCK_K;  // of 64 inputs, that have scales of their own

    struct alignas(64) Terms {
        float scales[PARTS][BLOCK_N], minimums[PARTS][BLOCK_N];
    };

    void read_terms(int64_t at) {
        Terms& terms = terms_[at % 2];
        for (int64_t part = 0; part < PARTS; part++) {
            store(terms.scales[part], scales_(at * PARTS + part));
            if constexpr (Group::HAS_MINIMUMS) store(terms.minimums[part], scales_.minimum(at * PARTS + part));
        }
    }

    [[gnu::always_inline]] __m512i table(const Terms& terms, int64_t output) const {
        const auto part = [&](int64_t i) {
            F32x16 values = codebook_ * terms.scales[i][output];
            if constexpr (Group::HAS_MINIMUMS) values += terms.minimums[i][output];
            return (__m512)values;
        };
        const __m512 first = part(0);
        return (__m512i)_mm512_cvtne2ps_pbh(PARTS == 1 ? first : part(PARTS - 1), first);
    }

    Scales<Group> scales_;
    const F32x16 codebook_;
    const int64_t rest_;
    const uint8_t* codes_;
    int64_t at_ = 0;
    Terms terms_[2];
};

// The rows of x as right-hand tiles, [tiles of 16 rows][inputs / 32][16 pairs of inputs][16 rows][2], inputs in the order of
// decode_by_tables. Each thread makes them for itself, once a call: what another core has just written takes longer to read.
class OrderedRows {
public:
    OrderedRows(const BFloat16* x, int64_t m, int64_t k) : x_(x), m_(m), k_(k), call_(++calls_) {}

    const BFloat16* of_this_thread() const {
        thread_local AlignedVector<BFloat16> tiles;
        thread_local uint64_t call = 0;
        if (call != call_) {
            tiles.resize((m_ + M_TILE - 1) / M_TILE * M_TILE * k_);
            for (int64_t row = 0; row < m_; row += M_TILE) order(row, tiles.data() + row * k_);
            call = call_;
        }
        return tiles.data();
    }

private:
    void order(int64_t first, BFloat16* to) const {
        const int64_t rows = std::min(M_TILE, m_ - first);
        for (int64_t input = 0; input < k_; input += K_TILE) {
            __m512i pairs[M_TILE];
            for (int64_t row = 0; row < M_TILE; row++)
                pairs[row] = row < rows ? _mm512_loadu_si512(x_ + (first + row) * k_ + input) : _mm512_setzero_si512();
            transpose(pairs);
            BFloat16* tiles = to + input / TABLE_INPUTS * TABLE_INPUTS * M_TILE;
            const int64_t half = input % TABLE_INPUTS / K_TILE;  // of the rows of codes that have these inputs
#pragma GCC unroll 16
            for (int64_t pair = 0; pair < M_TILE; pair++) {
                const int64_t nibble = pair % 4, place = nibble % 2 * 8 + half * 4 + pair / 4;
                _mm512_store_si512(tiles + nibble / 2 * LEFT_TILE + place * 2 * M_TILE, pairs[pair]);
            }
        }
    }

    static inline std::atomic<uint64_t> calls_{0};
    const BFloat16* const x_;
    const int64_t m_, k_;
    const uint64_t call_;
};

// The sums of up to two blocks of outputs and 32 rows, turned round as they go to y.
template <class Y>
struct TurnedSums {
    TurnedSums() {}  // leaves the sums as they are
    alignas(64) float sums[2][2][C_TILE];  // [block][tile of rows][16 outputs][16 rows]
    int64_t rows = 0, blocks = 0;
    const BFloat16* bias;  // at the first output, or null
    Y* y;                  // at the first row and output

    void finish(int64_t row_tile, int64_t y_stride) const {
        const int64_t first = row_tile * M_TILE, last = std::min(first + M_TILE, rows);
        if (first >= last) return;
        __m512i totals[2][M_TILE];
        for (int64_t block = 0; block < blocks; block++) {
            std::memcpy(totals[block], sums[block][row_tile], sizeof totals[block]);
            transpose(totals[block]);
        }
        const F32x16 biases[2] = {load_bias(bias, 0), load_bias(bias, blocks - 1)};
        for (int64_t row = first; row < last; row++) {
            const auto total = [&](int64_t block) { return (F32x16)totals[block][row - first] + biases[block]; };
            if (blocks == 2) store_two(y + row * y_stride, total(0), total(1));
            else store(y + row * y_stride, total(0));
        }
    }
};

// y[m, some pairs of blocks of outputs], a chunk of inputs at a time: its weights are decoded into the first cache and meet
// all rows there. (Decoding them while AMX multiplies the chunk before is no faster.)
template <class Group, class Y>
class TableProducts {
public:
    TableProducts(const Group& group, const OrderedRows& rows, int64_t m, const BFloat16* bias, Y* y)
        : group_(group), k_(group.num_inputs), m_(m), rows_(rows.of_this_thread()), bias_(bias), y_(y),
          keeps_sums_(m <= 2 * M_TILE) {
        sums_.resize(keeps_sums_ ? 2 : (m + 2 * M_TILE - 1) / (2 * M_TILE));
    }

    void multiply(int64_t pair, FetchAhead& fetch) {
        const int64_t block = 2 * pair, blocks = std::min<int64_t>(2, group_.num_outputs / BLOCK_N - block);
        TableDecoder<Group> decoders[2] = {{group_, block}, {group_, block + blocks - 1}};
        for (int64_t first = 0; first < k_; first += CHUNK_INPUTS) {
            const int64_t last = std::min(first + CHUNK_INPUTS, k_);
            for (int64_t input = 0; input < last - first; input += TABLE_INPUTS) {
                fetch();
                for (int64_t i = 0; i < blocks; i++) decoders[i].next(weights_[i] + input * BLOCK_N);
            }
            for (int64_t row = 0; row < m_; row += 2 * M_TILE) multiply_chunk(block, blocks, row, first, last);
        }
        turn_++;
    }

    // The last sums' way to y.
    void finish() {
        if (!pending_) return;
        for (int64_t tile = 0; tile < 2; tile++) pending_->finish(tile, group_.num_outputs);
        pending_ = nullptr;
    }

private:
    void multiply_chunk(int64_t block, int64_t blocks, int64_t row, int64_t first, int64_t last) {
        TurnedSums<Y>& now = sums_[keeps_sums_ ? turn_ % 2 : row / (2 * M_TILE)];
        if (pending_ == &now) finish();
        if (first == 0) {
            now.rows = std::min(2 * M_TILE, m_ - row);
            now.blocks = blocks;
            now.bias = bias_ ? bias_ + block * BLOCK_N : nullptr;
            now.y = y_ + row * group_.num_outputs + block * BLOCK_N;
        }
        const BFloat16* x = rows_ + row * k_ + first * M_TILE;
        const bool has_two = now.rows > M_TILE;
        if (blocks == 2 && has_two) add_products<2, 2>(now, x, first, last);
        else if (blocks == 2) add_products<2, 1>(now, x, first, last);
        else if (has_two) add_products<1, 2>(now, x, first, last);
        else add_products<1, 1>(now, x, first, last);
    }

    // The sums before these go to y meanwhile, if they are whole.
    template <int BLOCKS, int ROW_TILES>
    void add_products(TurnedSums<Y>& now, const BFloat16* x, int64_t first, int64_t last) {
        using Sums = TileSums<BLOCKS, ROW_TILES>;
        if (first == 0) Sums::zero();
        else if (!keeps_sums_) Sums::load(now.sums);
        for (int64_t input = 0; input < last - first; input += K_TILE) {
            const int64_t at = input * M_TILE;
            Sums::add({weights_[0] + at, weights_[1] + at}, K_TILE, {x + at, x + M_TILE * k_ + at});
            if (pending_ && input < 2 * K_TILE) pending_->finish(input / K_TILE, group_.num_outputs);
        }
        if (last == k_ || !keeps_sums_) Sums::store(now.sums);
        pending_ = last == k_ ? &now : nullptr;
    }

    const Group& group_;
    const int64_t k_, m_;
    const BFloat16* const rows_;
    const BFloat16* const bias_;
    Y* const y_;
    const bool keeps_sums_;  // in AMX's registers, from chunk to chunk: there are no others
    alignas(64) BFloat16 weights_[2][CHUNK_INPUTS * BLOCK_N];
    AlignedVector<TurnedSums<Y>> sums_;
    TurnedSums<Y>* pending_ = nullptr;
    int64_t turn_ = 0;
};

// y = x · weightᵀ + bias; the number of inputs is a multiple of 64.
template <class Group, class Y>
void linear_tables(const Group& group, const BFloat16* x, int64_t m, const BFloat16* bias, Y* y) {
    const OrderedRows rows(x, m, group.num_inputs);
    const int64_t pairs = (group.num_outputs / BLOCK_N + 1) / 2;
    parallel_with_side_path(pairs, x, group.num_inputs / TABLE_INPUTS, [&](int64_t first, int64_t last, FetchAhead& fetch) {
        const Tiles tiles;
        TableProducts<Group, Y> products(group, rows, m, bias, y);
        for (int64_t pair = first; pair < last; pair++) products.multiply(pair, fetch);
        products.finish();
    });
}

}  // namespace onebase
