// Weights of 4 bits with a codebook (NF4, FP4) as the kernels read them, and how codes of 4 bits lie in general.
//
// Packed layout (tiles.py makes it): outputs in blocks of 16, for each of them a row of 64 bytes for every 8 inputs.
// 16-bit word w of a row belongs to output w/2 of the block, its nibble q is the code of input 8·row + 2q + w%2. So a row
// that is looked up nibble by nibble gives pairs of inputs for all 16 outputs, as the machine's dot products of pairs and
// AMX want them, and seen as 32-bit lanes a row has one output in each, as plain multiply-adds want them.
// The rows whose inputs share scales are a tile. Scales follow the same order: 16 for each tile, fp32 or 8-bit.
//
// Kernels are templates over the group of weights, which says how many inputs a tile has (BLOCK_K), what codes stand for
// (codebook(), within [-1, 1]) and, by the templates Scales and Starts, how sums of products become outputs.
#pragma once

#include "simd.h"

namespace onebase {

constexpr int64_t BLOCK_N = 16;
constexpr int64_t ROW_INPUTS = 8;
constexpr int64_t ROW_BYTES = BLOCK_N * ROW_INPUTS / 2;
constexpr int64_t BYTES_AHEAD = 8192;  // that codes are fetched before they are needed
constexpr int64_t NESTED_BLOCK = 256;  // 8-bit scales that share an fp32 scale

template <class Group>
constexpr int64_t TILE_ROWS = Group::BLOCK_K / ROW_INPUTS;

template <class Group>
constexpr int64_t TILE_BYTES = TILE_ROWS<Group> * ROW_BYTES;

// One weight [n, k] of a group whose outputs lie side by side.
struct BlockwiseSlice {
    const float* nested_absmax;  // of 8-bit scales, one for 256 of them in the weight's own (row-major) order
    float offset;                // added to every decoded 8-bit scale
    int64_t num_outputs;
};

struct BlockwiseGroup {
    static constexpr int64_t BLOCK_K = 64;
    static constexpr bool HAS_MINIMUMS = false;
    F32x16 codebook() const { return load(values); }

    const float* values;  // what codes stand for
    const uint8_t* codes;
    const void* scales;      // uint8 if quant_map is there, else float
    const float* quant_map;  // what 8-bit scales stand for; null without double quantisation
    const BlockwiseSlice* slices;
    int64_t num_outputs;  // of all slices together
    int64_t num_inputs;
};

// The bias of one output block, nothing where there is none.
template <class T>
inline F32x16 load_bias(const T* bias, int64_t block) {
    return bias ? load(bias + block * BLOCK_N) : F32x16{};
}

// What the sums of products begin with: the bias, where a group of weights has nothing else.
template <class Group, class X>
class Starts {
public:
    Starts(const Group&, const X*, int64_t, const X* bias) : bias_(bias) {}

    // Of the rows of x from `row` on, for 16 outputs each.
    template <int ROWS>
    void set(F32x16 (&sums)[ROWS], int64_t block, int64_t) const {
        const F32x16 bias = load_bias(bias_, block);
        for (auto& sum : sums) sum = bias;
    }

private:
    const X* bias_;
};

// The scales of one output block, tile by tile.
template <class Group>
class Scales;

template <>
class Scales<BlockwiseGroup> {
public:
    Scales(const BlockwiseGroup& group, int64_t block) : group_(group), tiles_(group.num_inputs / BlockwiseGroup::BLOCK_K) {
        first_ = block * tiles_ * BLOCK_N;
        if (!group.quant_map) return;
        int64_t output = block * BLOCK_N;
        slice_ = group.slices;
        while (output >= slice_->num_outputs) output -= (slice_++)->num_outputs;
        // The scale of input block t is number row·tiles + t of its weight, and `t < change` shares `before`.
        row_ = (LANE + int32_t(output)) * int32_t(tiles_);
        nested_last_ = int32_t((slice_->num_outputs * tiles_ - 1) / NESTED_BLOCK);
        enter_nested_block(0);
    }

    // 16 scales, one for each output of the block, for input block `tile`; to be asked for in ascending order.
    F32x16 operator()(int64_t tile) {
        const int64_t at = first_ + tile * BLOCK_N;
        if (!group_.quant_map) return load(static_cast<const float*>(group_.scales) + at);
        if (tile % NESTED_BLOCK == 0 && tile) enter_nested_block(int32_t(tile));
        const U8x16 codes = load_raw<U8x16>(static_cast<const uint8_t*>(group_.scales) + at);
        const F32x16 values = gather(group_.quant_map, (I32x16)widen_integers(codes));
        return values * (change_ > int32_t(tile) ? before_ : after_) + slice_->offset;
    }

    // Turns what the tile's codes stand for into weights.
    auto decoder(int64_t tile) {
        return [scale = (*this)(tile)](F32x16 values) { return values * scale; };
    }

private:
    void enter_nested_block(int32_t tile) {
        const I32x16 nested = (row_ + tile) / int32_t(NESTED_BLOCK);
        const I32x16 next = nested + 1 > nested_last_ ? I32x16{} + nested_last_ : nested + 1;
        before_ = gather(slice_->nested_absmax, nested);
        after_ = gather(slice_->nested_absmax, next);
        change_ = (nested + 1) * int32_t(NESTED_BLOCK) - row_;
    }

    const BlockwiseGroup& group_;
    int64_t tiles_, first_;
    const BlockwiseSlice* slice_ = nullptr;
    I32x16 row_{}, change_{};
    int32_t nested_last_ = 0;
    F32x16 before_{}, after_{};
};

}  // namespace onebase
