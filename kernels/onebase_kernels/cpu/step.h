// What changes from step to step, for all ops of a step alike; library.py has the same fields.
//
// Every op is a function of its own call, which says where its operands lie and stays the same from step to step, and of
// the step. So the calls of a whole step can be written down once and run again and again (program.cpp).
#pragma once

#include <cstdint>

namespace onebase {

// Rows start to stop - 1 of the step use the adapter in one slot.
struct Segment {
    int64_t slot, start, stop;
};

struct Step {
    int64_t rows;                 // tokens, of all requests one after another
    const int64_t* token_ids;     // [rows]
    const int64_t* positions;     // [rows], of each token in its request
    const int64_t* slot_mapping;  // [rows], where each token's keys and values go in the cache
    int64_t num_requests;
    const int64_t* query_starts;  // [num_requests + 1]
    const int64_t* context_lens;  // [num_requests]
    const int32_t* block_tables;  // [num_requests, table_width]
    int64_t table_width;
    int64_t num_segments;
    const Segment* segments;
    const void* arena;             // the numbers of all adapters
    const int64_t* adapter_table;  // [places, slots, 5]
    int64_t slots;
    int64_t adapters_are_int8;     // whether their matrices are kept in 8 bits
    int64_t num_replaced;         // rows whose embeddings are not the table's
    const int64_t* replaced_rows;  // [num_replaced]
    const char* replacements;      // [num_replaced, …], in the compute dtype
};

}  // namespace onebase
