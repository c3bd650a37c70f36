// Work shared between a few threads of the library's own, for machines that are busy with other things too.
//
// A call cuts its work into pieces that threads claim one by one, the caller among them, and ends as soon as all pieces
// are done: it never waits for a thread that claimed none, because the system is running something else in its place.
// (OpenMP's barrier does wait; on two cores shared with the HTTP process a step then takes ten times as long.) Between
// calls the threads spin for some microseconds, for the next op of a step is near, then sleep.
#pragma once

#include <algorithm>
#include <cstdint>

namespace onebase {

constexpr int64_t PIECES_PER_THREAD = 4;

// How many threads compute, the caller among them.
int64_t num_threads();

// Calls `run(context, piece)` for every piece in [0, pieces), on all threads.
void run_pieces(int64_t pieces, void (*run)(const void* context, int64_t piece), const void* context);

// Calls `body(first, last)` for runs of items that together are [0, count).
template <class Body>
inline void parallel(int64_t count, Body body) {
    const int64_t pieces = std::min(count, num_threads() == 1 ? 1 : num_threads() * PIECES_PER_THREAD);
    if (pieces <= 1) {
        if (count > 0) body(int64_t(0), count);
        return;
    }
    struct Context {
        const Body& body;
        int64_t count, pieces;
    } context{body, count, pieces};
    run_pieces(
        pieces,
        [](const void* opaque, int64_t piece) {
            const auto& c = *static_cast<const Context*>(opaque);
            c.body(c.count * piece / c.pieces, c.count * (piece + 1) / c.pieces);
        },
        &context);
}

}  // namespace onebase
