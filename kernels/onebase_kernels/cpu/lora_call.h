// What lora.cpp and lora_amx.h share: the call, and a projection group with the adapters' table.
#pragma once

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

// What a segment's adapter has for one linear of a group.
template <class T>
struct LoraSlice {
    int64_t first_rank, rank, first_column, width;
    const T* b;     // [rank, width]
    const T* gain;  // of its epilogue, the shift behind it; null if it has none
};

template <class T>
struct LoraGroup {
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
        return numbers * int64_t(sizeof(T));
    }
    const T* a(const Segment& segment) const { return arena + table[segment.slot * TABLE_COLUMNS]; }

    // Calls `body(slice)` for each slice that the adapter changes. Epilogues follow the last slice's B.
    template <class Body>
    void each_slice(const Segment& segment, Body body) const {
        const T *b = a(segment) + total_rank(segment) * num_inputs, *epilogue = b;
        for (int64_t i = 0; i < num_slices; i++) epilogue += ranks(segment)[i] * widths[i];
        int64_t first_rank = 0, first_column = 0;
        for (int64_t i = 0; i < num_slices; i++) {
            const int64_t rank = ranks(segment)[i], width = widths[i];
            const bool has_epilogue = ranks(segment)[MOST_SLICES] >> i & 1;
            if (rank || has_epilogue)
                body(LoraSlice<T>{first_rank, rank, first_column, width, b, has_epilogue ? epilogue : nullptr});
            if (has_epilogue) epilogue += 2 * width;
            b += rank * width;
            first_rank += rank;
            first_column += width;
        }
    }
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
