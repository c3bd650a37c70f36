// NF4 × activations, fused: codes are decoded in registers and never written to memory as a weight matrix.
//
// Packed layout (packing.py makes it): outputs in blocks of 16, inputs in blocks of 64, one tile of 512 bytes for each
// pair of blocks, output block by output block. A tile is 8 rows of 64 bytes, two rows for every 16 inputs: in the first
// of the two, 32-bit lane j belongs to output j/2 of the block, in the second to output 8 + j/2; the lane's nibble q is
// the code of input 16·(row/2) + 2q + j%2. Two such lanes side by side are one column of an AMX tile, and rounding the
// decoded rows to bfloat16 leaves them just as AMX wants them.
// Scales follow the same order: 16 for each tile, fp32 or 8-bit.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace onebase {
namespace {

constexpr int64_t BLOCK_N = 16;
constexpr int64_t BLOCK_K = 64;
constexpr int64_t TILE_BYTES = BLOCK_N * BLOCK_K / 2;
constexpr int64_t NESTED_BLOCK = 256;  // 8-bit scales that share an fp32 scale

const F32x16 CODEBOOK = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                         -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                         0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                         0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

const I32x16 FIRST_HALF = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};  // output of each lane
const I32x16 SECOND_HALF = FIRST_HALF + 8;
const I32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

}  // namespace

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

namespace {

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

inline F32x16 spread(F32x16 per_output, I32x16 outputs) { return lookup(per_output, (U32x16)outputs); }

// ---- few rows: decode, multiply and add in fp32 -------------------------------------------------------------------

// y[m, 16 outputs] for ROWS rows of x (fp32, stride k).
template <int ROWS, class T>
void multiply_rows(const Nf4Group& group, int64_t block, const float* x, T* y, int64_t y_stride) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    Scales scales(group, block);
    F32x16 total[ROWS][2] = {};
    for (int64_t tile = 0; tile < tiles; tile++) {
        F32x16 part[ROWS][2] = {};
        for (int row = 0; row < 4; row++) {
            const U32x16 first = load_raw<U32x16>(codes + tile * TILE_BYTES + row * 128);
            const U32x16 second = load_raw<U32x16>(codes + tile * TILE_BYTES + row * 128 + 64);
            const float* inputs = x + tile * BLOCK_K + row * 16;
#pragma GCC unroll 8
            for (int q = 0; q < 8; q++) {
                const F32x16 a = lookup(CODEBOOK, first >> (4 * q)), b = lookup(CODEBOOK, second >> (4 * q));
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++) {
                    double pair;  // two neighbouring inputs, for the even and the odd lanes
                    std::memcpy(&pair, inputs + m * k + 2 * q, 8);
                    typedef double F64x8 __attribute__((vector_size(64)));
                    const F32x16 both = (F32x16)(F64x8{pair, pair, pair, pair, pair, pair, pair, pair});
                    part[m][0] += a * both;
                    part[m][1] += b * both;
                }
            }
        }
        const F32x16 scale = scales(tile);
        const F32x16 first_scale = spread(scale, FIRST_HALF), second_scale = spread(scale, SECOND_HALF);
        for (int m = 0; m < ROWS; m++) {
            total[m][0] += part[m][0] * first_scale;
            total[m][1] += part[m][1] * second_scale;
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 8; i++)
                store_one(y + m * y_stride + block * BLOCK_N + half * 8 + i,
                          total[m][half][2 * i] + total[m][half][2 * i + 1]);
}

template <class T>
void multiply_few(const Nf4Group& group, int64_t block, const float* x, int64_t m, T* y, int64_t y_stride) {
    const int64_t k = group.num_inputs;
    int64_t row = 0;
    const auto multiply = [&]<int ROWS>() {  // a block is decoded once for so many rows
        for (; row + ROWS <= m; row += ROWS)
            multiply_rows<ROWS>(group, block, x + row * k, y + row * y_stride, y_stride);
    };
    multiply.template operator()<8>();
    multiply.template operator()<4>();
    multiply.template operator()<2>();
    multiply.template operator()<1>();
}

#if defined(__AVX512BF16__)
// ---- more rows: decode to bfloat16, then let the machine's dot products of pairs do the sums ------------------------

// Half a tile, 32 inputs by 16 outputs, as 16 rows of pairs of inputs; this is AMX's layout of a right-hand tile.
inline void decode_half(const uint8_t* codes, F32x16 first_scale, F32x16 second_scale, BFloat16* to) {
#pragma GCC unroll 2
    for (int row = 0; row < 2; row++) {
        const U32x16 first = load_raw<U32x16>(codes + row * 128), second = load_raw<U32x16>(codes + row * 128 + 64);
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
            const F32x16 a = lookup(CODEBOOK, first >> (4 * q)) * first_scale;
            const F32x16 b = lookup(CODEBOOK, second >> (4 * q)) * second_scale;
            const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
            std::memcpy(to + (row * 8 + q) * 32, &pairs, 64);
        }
    }
}

#if defined(__AMX_BF16__)

constexpr int64_t MAX_TILE_ROWS = 6;  // 16 rows each: as many sums as there are tiles for

// y[16·TILE_ROWS rows, 16 outputs]; both loops over tiles are unrolled, for AMX's operands are constants.
template <int TILE_ROWS>
void multiply_tiles(const Nf4Group& group, int64_t block, const BFloat16* x, float* sums) {
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    alignas(64) BFloat16 weights[2][2][16 * 32];
    Scales scales(group, block);
    _tile_zero(0);
    if constexpr (TILE_ROWS > 1) _tile_zero(1);
    if constexpr (TILE_ROWS > 2) _tile_zero(2);
    if constexpr (TILE_ROWS > 3) _tile_zero(3);
    if constexpr (TILE_ROWS > 4) _tile_zero(4);
    if constexpr (TILE_ROWS > 5) _tile_zero(5);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const F32x16 scale = scales(tile);
        const F32x16 first_scale = spread(scale, FIRST_HALF), second_scale = spread(scale, SECOND_HALF);
        for (int half = 0; half < 2; half++) {
            BFloat16* decoded = weights[tile % 2][half];
            decode_half(codes + tile * TILE_BYTES + half * 256, first_scale, second_scale, decoded);
            const BFloat16* inputs = x + tile * BLOCK_K + half * 32;
            _tile_loadd(7, decoded, 64);
#define ONEBASE_TILE_ROW(i)                              \
    if constexpr (TILE_ROWS > i) {                       \
        _tile_loadd(6, inputs + 16 * (i) * k, 2 * k);    \
        _tile_dpbf16ps(i, 6, 7);                         \
    }
            ONEBASE_TILE_ROW(0)
            ONEBASE_TILE_ROW(1)
            ONEBASE_TILE_ROW(2)
            ONEBASE_TILE_ROW(3)
            ONEBASE_TILE_ROW(4)
            ONEBASE_TILE_ROW(5)
#undef ONEBASE_TILE_ROW
        }
    }
    _tile_stored(0, sums, 64);
    if constexpr (TILE_ROWS > 1) _tile_stored(1, sums + 256, 64);
    if constexpr (TILE_ROWS > 2) _tile_stored(2, sums + 512, 64);
    if constexpr (TILE_ROWS > 3) _tile_stored(3, sums + 768, 64);
    if constexpr (TILE_ROWS > 4) _tile_stored(4, sums + 1024, 64);
    if constexpr (TILE_ROWS > 5) _tile_stored(5, sums + 1280, 64);
}

void multiply_many(const Nf4Group& group, int64_t block, const BFloat16* x, int64_t m, BFloat16* y, int64_t y_stride) {
    alignas(64) float sums[MAX_TILE_ROWS * 256];
    for (int64_t row = 0; row < m; row += MAX_TILE_ROWS * 16) {
        const BFloat16* inputs = x + row * group.num_inputs;
        switch (std::min<int64_t>(MAX_TILE_ROWS, (m - row + 15) / 16)) {
            case 1: multiply_tiles<1>(group, block, inputs, sums); break;
            case 2: multiply_tiles<2>(group, block, inputs, sums); break;
            case 3: multiply_tiles<3>(group, block, inputs, sums); break;
            case 4: multiply_tiles<4>(group, block, inputs, sums); break;
            case 5: multiply_tiles<5>(group, block, inputs, sums); break;
            default: multiply_tiles<6>(group, block, inputs, sums);
        }
        for (int64_t i = 0; i < std::min(m - row, MAX_TILE_ROWS * 16); i++)
            store(y + (row + i) * y_stride + block * BLOCK_N, load(sums + i * 16));
    }
}

#else

void multiply_many(const Nf4Group& group, int64_t block, const BFloat16* x, int64_t m, BFloat16* y, int64_t y_stride) {
    constexpr int ROWS = 16;
    const int64_t k = group.num_inputs, tiles = k / BLOCK_K;
    const uint8_t* codes = group.codes + block * tiles * TILE_BYTES;
    alignas(64) BFloat16 weights[16 * 32];
    for (int64_t row = 0; row < m; row += ROWS) {
        __m512 sums[ROWS] = {};
        Scales scales(group, block);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const F32x16 scale = scales(tile);
            const F32x16 first_scale = spread(scale, FIRST_HALF), second_scale = spread(scale, SECOND_HALF);
            for (int half = 0; half < 2; half++) {
                decode_half(codes + tile * TILE_BYTES + half * 256, first_scale, second_scale, weights);
                const BFloat16* inputs = x + row * k + tile * BLOCK_K + half * 32;
                for (int pair = 0; pair < 16; pair++) {
                    const __m512bh column = (__m512bh)_mm512_load_si512(weights + pair * 32);
#pragma GCC unroll 16
                    for (int i = 0; i < ROWS; i++) {
                        int32_t two;
                        std::memcpy(&two, inputs + i * k + pair * 2, 4);
                        sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_epi32(two), column);
                    }
                }
            }
        }
        for (int64_t i = 0; i < std::min<int64_t>(m - row, ROWS); i++)
            store(y + (row + i) * y_stride + block * BLOCK_N, (F32x16)sums[i]);
    }
}

#endif

constexpr int64_t FEW = 2;  // up to so many rows, products in fp32 are the faster ones

void linear_many(const Nf4Group& group, const BFloat16* x, int64_t m, BFloat16* y) {
    const int64_t k = group.num_inputs, padded = (m + 15) / 16 * 16;  // multiply_many reads whole tiles of rows
    std::vector<BFloat16> copy;
    if (padded != m) {
        copy.resize(padded * k);
        std::memcpy(copy.data(), x, m * k * sizeof(BFloat16));
    }
    const BFloat16* rows = copy.empty() ? x : copy.data();
    parallel(group.num_outputs / BLOCK_N, [&](int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
        const Tiles tiles;
#endif
        for (int64_t block = first; block < last; block++) multiply_many(group, block, rows, m, y, group.num_outputs);
    });
}
#endif  // __AVX512BF16__

template <class T>
void linear_few(const Nf4Group& group, const T* x, int64_t m, T* y) {
    const int64_t k = group.num_inputs;
    std::vector<float> wide(m * k);
    for (int64_t i = 0; i < m * k; i += LANES) store(wide.data() + i, load(x + i));
    parallel(group.num_outputs / BLOCK_N, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++)
            multiply_few(group, block, wide.data(), m, y, group.num_outputs);
    });
}

template <class T>
void linear(const Nf4Group& group, const T* x, int64_t m, T* y) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(BFloat16))
        if (m > FEW) return linear_many(group, x, m, y);
#endif
    linear_few(group, x, m, y);
}

}  // namespace
}  // namespace onebase

// y[m, num_outputs] = x[m, num_inputs] · Wᵀ, both of `dtype` and contiguous.
ONEBASE_EXPORT void onebase_nf4_linear(const onebase::Nf4Group* group, const void* x, int64_t m, void* y, int32_t dtype) {
    onebase::dispatch(dtype, [&]<class T>() {
        onebase::linear(*group, static_cast<const T*>(x), m, static_cast<T*>(y));
    });
}

// Whether this machine and its kernel let the library run as compiled; called once, before anything else.
ONEBASE_EXPORT int32_t onebase_start() {
#if defined(__AMX_BF16__)
    return onebase::request_tiles();
#else
    return 1;
#endif
}
