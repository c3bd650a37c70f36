// What lora.cpp and lora_amx.h share: the call, and a projection group with the adapters' table.
#pragma once

#include <type_traits>

#include "simd.h"
#include "step.h"

namespace onebase {

constexpr int64_t MOST_SLICES = 3;  // of a group
constexpr int64_t TABLE_COLUMNS = 2 + MOST_SLICES;  // of a row of the table: offset in the arena, ranks, epilogues

struct AddLora {
    void* y;        // [rows, num_outputs], to be added to; where the side path is only started: null
    const void* x;  // [rows, num_inputs]
    const int64_t* widths;  // [num_slices], together num_outputs
    int64_t num_slices, num_inputs, num_outputs;
    int64_t place;  // of this projection group in the adapters' table
    int32_t dtype;
    int32_t is_started;  // by the call before the product that made y
};

// What a segment's adapter has for one linear of a group. M is what matrices are kept in: T itself, or Int8Code.
template <class T, class M>
struct LoraSlice {
    int64_t first_rank, rank, first_column, width;
    const M* b;     // [rank, width]
    const T* gain;  // of its epilogue, the shift behind it; null if it has none
};

template <class T, class M>
struct LoraGroup {
    static constexpr bool IS_INT8 = std::is_same_v<M, Int8Code>;

    const T* x;
    const T* arena;
    const int64_t* table;  // [slots, TABLE_COLUMNS]
    const int64_t* widths;
    int64_t num_slices, num_inputs, num_outputs;

    const int64_t* ranks(const Segment& segment) const { return table + segment.slot * TABLE_COLUMNS + 1; }
    int64_t total_rank(const Segment& segment) const {
        int64_t total = 0;
        for (int64_t i = 0; i < num_slices; i++) total += ranks(segment)[i];
        return total;
    }
    int64_t num_bytes(const Segment& segment) const {
        int64_t numbers = total_rank(segment) * num_inputs;
        for (int64_t i = 0; i < num_slices; i++) numbers += ranks(segment)[i] * widths[i];
        return numbers * int64_t(sizeof(M));
    }
    const M* a(const Segment& segment) const {
        const T* at = start(segment);
        if constexpr (!IS_INT8) return at;
        else return reinterpret_cast<const M*>(at) + scale_bytes(total_rank(segment));
    }

    // What the product with a row of A and of B is scaled by.
    float scale(const Segment& segment, int64_t rank) const {
        if constexpr (!IS_INT8) return 1;
        const float* scales = reinterpret_cast<const float*>(start(segment));
        return scales[rank] * scales[total_rank(segment) + rank];
    }

    // Calls `body(slice)` for each slice that the adapter changes. Epilogues follow the last slice's B.
    template <class Body>
    void each_slice(const Segment& segment, Body body) const {
        const M *b = a(segment) + total_rank(segment) * num_inputs, *end = b;
        for (int64_t i = 0; i < num_slices; i++) end += ranks(segment)[i] * widths[i];
        const T* epilogue = reinterpret_cast<const T*>(end);
        int64_t first_rank = 0, first_column = 0;
        for (int64_t i = 0; i < num_slices; i++) {
            const int64_t rank = ranks(segment)[i], width = widths[i];
            const bool has_epilogue = ranks(segment)[MOST_SLICES] >> i & 1;
            if (rank || has_epilogue)
                body(LoraSlice<T, M>{first_rank, rank, first_column, width, b, has_epilogue ? epilogue : nullptr});
            if (has_epilogue) epilogue += 2 * width;
            b += rank * width;
            first_rank += rank;
            first_column += width;
        }
    }

private:
    const T* start(const Segment& segment) const { return arena + table[segment.slot * TABLE_COLUMNS]; }

    // Of A and B, filled up to whole lines of 64 bytes, as int8_matrices.py says.
    static int64_t scale_bytes(int64_t total_rank) { return (2 * total_rank * int64_t(sizeof(float)) + 63) / 64 * 64; }
};

// What an epilogue makes of 16 outputs, or of one: gain points to their gains, and `width` behind these are their shifts.
template <class T>
inline F32x16 finish(F32x16 y, const T* gain, int64_t width) {
    return y + (y * load(gain) + load(gain + width));
}
template <class T>
inline float finish_one(float y, const T* gain, int64_t width) {
    return y + (y * load_one(gain) + load_one(gain + width));
}

}  // namespace onebase
