// What lora.cpp and lora_amx.h share: the call, and a projection group with the adapters' table.
#pragma once

#include "simd.h"
#include "step.h"

namespace onebase {

constexpr int64_t TABLE_COLUMNS = 4;  // of a row of the table: offset in the arena, ranks of up to three slices

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
};

}  // namespace onebase
