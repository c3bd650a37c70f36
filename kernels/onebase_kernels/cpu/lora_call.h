// What lora.cpp and lora_amx.h share: the call, and a projection group with the adapters' table.
#pragma once

#include "simd.h"
#include "step.h"

namespace onebase {

constexpr int64_t MOST_SLICES = 3;  // of a group
constexpr int64_t TABLE_COLUMNS = 2 + MOST_SLICES;  // of a row of the table: offset in the arena, ranks, epilogues

struct AddLora {
    void* y;        // [rows, num_outputs], to be added to
    const void* x;  // [rows, num_inputs]
    const int64_t* widths;  // [num_slices], together num_outputs
    int64_t num_slices, num_inputs, num_outputs;
    int64_t place;  // of this projection group in the adapters' table
    int32_t dtype;
};

template <class T>
struct LoraGroup {
    const T* x;
    T* y;
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
    const T* a(const Segment& segment) const { return arena + table[segment.slot * TABLE_COLUMNS]; }
    const T* b(const Segment& segment) const { return a(segment) + total_rank(segment) * num_inputs; }
    bool has_epilogue(const Segment& segment, int64_t slice) const {
        return ranks(segment)[MOST_SLICES] >> slice & 1;
    }
    // The gain, then the shift, of the first slice that has an epilogue; they follow the last slice's B.
    const T* epilogues(const Segment& segment) const {
        const T* end = b(segment);
        for (int64_t i = 0; i < num_slices; i++) end += ranks(segment)[i] * widths[i];
        return end;
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
