// Weights of group-wise int4 as the kernels read them: scale · code + minimum.
//
// Codes lie as blockwise_weight.h says; 16 scales and 16 minimums for each quantisation group of each block of outputs. With
// groups of 32 inputs a tile is a group, else it is 64 inputs of one. The minimums meet no code: what they add to an
// output is their product with the sums of x over each tile, which the sums of products begin with.
#pragma once

#include <vector>

#include "blockwise_weight.h"

namespace onebase {

struct Int4Weights {
    const uint8_t* codes;
    const Float16* scales;
    const float* minimums;
    int64_t num_outputs;
    int64_t num_inputs;
    int64_t group_size;  // inputs that share a scale and a minimum
};

template <int64_t TILE_INPUTS>
struct Int4Group : Int4Weights {
    static constexpr int64_t BLOCK_K = TILE_INPUTS;
    static constexpr bool HAS_MINIMUMS = true;
    static constexpr float CODES = 16.0f;

    // Codes as shares of 16, which bfloat16 and fixed point know exactly.
    static F32x16 codebook() { return __builtin_convertvector(LANE, F32x16) / CODES; }

};

// Where the scales and the minimums of a block's tiles begin.
template <int64_t BLOCK_K>
class Int4Places {
public:
    Int4Places(const Int4Group<BLOCK_K>& group, int64_t block)
        : first_(block * (group.num_inputs / group.group_size)), shift_(__builtin_ctzll(group.group_size / BLOCK_K)) {}

    int64_t operator()(int64_t tile) const { return (first_ + (tile >> shift_)) * BLOCK_N; }

private:
    int64_t first_;
    int shift_;  // for tiles that share a group
};

template <int64_t BLOCK_K>
class Scales<Int4Group<BLOCK_K>> {
public:
    Scales(const Int4Group<BLOCK_K>& group, int64_t block) : group_(group), places_(group, block) {}

    // 16 scales, one for each output of the block.
    F32x16 operator()(int64_t tile) const {
        return load(group_.scales + places_(tile)) * Int4Group<BLOCK_K>::CODES;
    }

    F32x16 minimum(int64_t tile) const { return load(group_.minimums + places_(tile)); }

    // Turns what the tile's codes stand for into weights.
    auto decoder(int64_t tile) const {
        return [scale = (*this)(tile), minimum = minimum(tile)](F32x16 values) { return values * scale + minimum; };
    }

private:
    const Int4Group<BLOCK_K>& group_;
    Int4Places<BLOCK_K> places_;
};

template <int64_t BLOCK_K, class X>
class Starts<Int4Group<BLOCK_K>, X> {
public:
    // x is [m, num_inputs].
    Starts(const Int4Group<BLOCK_K>& group, const X* x, int64_t m, const X* bias)
        : group_(group), tiles_(group.num_inputs / BLOCK_K), input_sums_((m + LANES) * tiles_), bias_(bias) {
        for (int64_t tile = 0; tile < m * tiles_; tile++) {
            F32x16 inputs{};
            for (int64_t i = 0; i < BLOCK_K; i += LANES) inputs += load(x + tile * BLOCK_K + i);
            input_sums_[tile] = sum(inputs);
        }
    }

    // Of the rows of x from `row` on, for 16 outputs each; rows beyond the last one, which fill up a tile, count as zeros.
    template <int ROWS>
    void set(F32x16 (&sums)[ROWS], int64_t block, int64_t row) const {
        const F32x16 bias = load_bias(bias_, block);
        for (auto& sum : sums) sum = bias;
        const Int4Places<BLOCK_K> places(group_, block);
        for (int64_t tile = 0; tile < tiles_; tile++) {
            const F32x16 minimum = load(group_.minimums + places(tile));
            for (int m = 0; m < ROWS; m++) sums[m] += minimum * input_sums_[(row + m) * tiles_ + tile];
        }
    }

private:
    const Int4Group<BLOCK_K>& group_;
    int64_t tiles_;
    std::vector<float> input_sums_;  // of each row and tile
    const X* bias_;
};

}  // namespace onebase
