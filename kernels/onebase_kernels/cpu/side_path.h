// The side path of a projection group between its two passes, and how the product that makes its y helps it: the first
// pass (the shrink) runs in that product's own pieces, whose loops ask memory early for what both passes read. By itself
// a side path waits for memory, and a product of few rows for arithmetic; together they wait once.
#pragma once

#include <memory>
#include <vector>

#include "fetch_ahead.h"
#include "parallel.h"

namespace onebase {

// Rows of a matrix, `columns` of each; rows lie `width` apart.
template <class T>
inline void add_rows(std::vector<Run>& runs, const T* matrix, int64_t first, int64_t last, int64_t columns, int64_t width) {
    const auto at = [&](int64_t row, int64_t column) { return reinterpret_cast<const char*>(matrix + row * width + column); };
    if (columns == width) runs.push_back({at(first, 0), at(last, 0)});
    else
        for (int64_t row = first; row < last; row++) runs.push_back({at(row, 0), at(row, columns)});
}

class SidePath {
public:
    SidePath(const void* x, bool is_fetched) : x(x), is_fetched(is_fetched) {}
    virtual ~SidePath() = default;

    // The pieces of the two passes, for any thread; all shrinks come before the first expand.
    virtual int64_t num_shrinks() const = 0;
    virtual int64_t num_expands() const = 0;
    virtual void shrink(int64_t first, int64_t last) = 0;
    virtual void expand(int64_t first, int64_t last, void* y) const = 0;
    // What a piece reads.
    virtual void add_shrink_runs(int64_t piece, std::vector<Run>& runs) const = 0;
    virtual void add_expand_runs(int64_t piece, std::vector<Run>& runs) const = 0;

    const void* const x;
    const bool is_fetched;  // by the product before it; otherwise it asks memory by itself
    bool is_shrunk = false;
};

// The calling thread's side path that was started and is not yet added; null if there is none.
inline std::unique_ptr<SidePath>& started_side_path() {
    thread_local std::unique_ptr<SidePath> started;
    return started;
}

// What a product asks memory for while it computes one of its `pieces`, in `calls` calls. A thread begins with the same
// pieces in every op (parallel.h), so what it fetches here is in its own cache when it comes to the expand.
inline FetchAhead fetch_ahead(const SidePath& side, int64_t piece, int64_t pieces, int64_t calls) {
    thread_local std::vector<Run> runs;
    runs.clear();
    const auto each = [&](int64_t count, auto add) {
        for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; i++) add(i);
    };
    each(side.num_shrinks(), [&](int64_t i) { side.add_shrink_runs(i, runs); });
    each(side.num_expands(), [&](int64_t i) { side.add_expand_runs(i, runs); });
    return FetchAhead(runs, calls);
}

// As `parallel`, for the product of x that makes a side path's y: `body(first, last, fetch)` calls `fetch` `calls` times
// for each item, and the side path of the same x, where one was started, is shrunk along with it.
template <class Body>
inline void parallel_with_side_path(int64_t count, const void* x, int64_t calls, const Body& body) {
    SidePath* side = started_side_path().get();
    if (side && (side->x != x || side->is_shrunk)) side = nullptr;  // another's, or done with a group's first weight
    const int64_t pieces = num_pieces(count);
    run_each(pieces, [&](int64_t piece) {
        const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces;
        FetchAhead fetch;
        if (side && side->is_fetched) fetch = fetch_ahead(*side, piece, pieces, calls * (last - first));
        body(first, last, fetch);
        if (side) side->shrink(side->num_shrinks() * piece / pieces, side->num_shrinks() * (piece + 1) / pieces);
    });
    if (side) side->is_shrunk = true;
}

}  // namespace onebase
