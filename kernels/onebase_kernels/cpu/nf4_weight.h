// NF4 weights as the kernels read them.
//
// Packed layout (nf4_packing.py makes it): outputs in blocks of 16, inputs in blocks of 64, one tile of 512 bytes for each
// pair of blocks, output block by output block. A tile is 8 rows of 64 bytes, one for every 8 inputs: 16-bit word w of a
// row belongs to output w/2 of the block, its nibble q is the code of input 8·row + 2q + w%2. So a row that is looked up
// nibble by nibble gives pairs of inputs for all 16 outputs, as the machine's dot products of pairs and AMX want them,
// and seen as 32-bit lanes a row has one output in each, as plain multiply-adds want them.
// Scales follow the same order: 16 for each tile, fp32 or 8-bit.
#pragma once

#include "simd.h"

namespace onebase {

constexpr int64_t BLOCK_N = 16;
constexpr int64_t BLOCK_K = 64;
constexpr int64_t TILE_BYTES = BLOCK_N * BLOCK_K / 2;
constexpr int64_t TILE_ROWS = 8;
constexpr int64_t ROW_INPUTS = BLOCK_K / TILE_ROWS;
constexpr int64_t BYTES_AHEAD = 8192;  // that codes are fetched before they are needed
constexpr int64_t NESTED_BLOCK = 256;  // 8-bit scales that share an fp32 scale

inline const F32x16 CODEBOOK = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                         -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                         0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                         0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

inline const I32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One weight [n, k] of a group whose outputs lie side by side.
struct Nf4Slice {
    const float* nested_absmax;  // of 8-bit scales, one for 256 of them in the weight's own (row-major) order
    float offset;                // added to every decoded 8-bit scale
    int64_t num_outputs;
};

struct Nf4Group {
    const uint8_t* codes;
    const void* scales;      // uint8 if quant_map is there, else float
    const float* quant_map;  // what 8-bit scales stand for; null without double quantisation
    const Nf4Slice* slices;
    int64_t num_outputs;  // of all slices together
    int64_t num_inputs;
};

// The bias of one output block, nothing where there is none.
template <class T>
inline F32x16 load_bias(const T* bias, int64_t block) {
    return bias ? load(bias + block * BLOCK_N) : F32x16{};
}

// The scales of one output block, tile by tile.
class Scales {
public:
    Scales(const Nf4Group& group, int64_t block) : group_(group), tiles_(group.num_inputs / BLOCK_K) {
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
        const F32x16 values = gather(group_.quant_map, __builtin_convertvector(codes, I32x16));
        return values * (change_ > int32_t(tile) ? before_ : after_) + slice_->offset;
    }

private:
    void enter_nested_block(int32_t tile) {
        const I32x16 nested = (row_ + tile) / int32_t(NESTED_BLOCK);
        const I32x16 next = nested + 1 > nested_last_ ? I32x16{} + nested_last_ : nested + 1;
        before_ = gather(slice_->nested_absmax, nested);
        after_ = gather(slice_->nested_absmax, next);
        change_ = (nested + 1) * int32_t(NESTED_BLOCK) - row_;
    }

    const Nf4Group& group_;
    int64_t tiles_, first_;
    const Nf4Slice* slice_ = nullptr;
    I32x16 row_{}, change_{};
    int32_t nested_last_ = 0;
    F32x16 before_{}, after_{};
};

}  // namespace onebase
